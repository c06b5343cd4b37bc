#define FORETOKEN_KERNELS kAvx512Kernels
#define FORETOKEN_KERNELS_NAME "avx512"
#include "cpu/row_kernels.inl"

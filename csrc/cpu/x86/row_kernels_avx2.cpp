#define FORETOKEN_KERNELS kAvx2Kernels
#define FORETOKEN_KERNELS_NAME "avx2"
#include "cpu/row_kernels.inl"

#include "cpu/x86/simd_avx512.hpp"

#define FORETOKEN_KERNELS kAvx512Kernels
#define FORETOKEN_KERNELS_NAME "avx512"
#include "cpu/row_kernels.inl"

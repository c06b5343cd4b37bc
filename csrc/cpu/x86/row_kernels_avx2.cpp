#include "cpu/x86/simd_avx2.hpp"

#define FORETOKEN_KERNELS kAvx2Kernels
#define FORETOKEN_KERNELS_NAME "avx2"
#include "cpu/row_kernels.inl"

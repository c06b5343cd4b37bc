#include "cpu/simd_portable.hpp"

#define FORETOKEN_KERNELS kPortableKernels
#define FORETOKEN_KERNELS_NAME "portable"
#include "cpu/row_kernels.inl"

// The few words that let one header serve the host compiler and nvcc.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FORETOKEN_HD __host__ __device__
// Where copies of long code would have to be fetched by every multiprocessor.
#define FORETOKEN_HD_OUTLINE __host__ __device__ __noinline__
#else
#define FORETOKEN_HD
#define FORETOKEN_HD_OUTLINE inline
#endif

// Forced: the same header is compiled for several instruction sets, and a shared out-of-line copy
// could carry AVX-512 code into the portable path.
#define FORETOKEN_INLINE static inline __attribute__((always_inline)) FORETOKEN_HD

namespace foretoken {

FORETOKEN_INLINE uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

FORETOKEN_INLINE float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FORETOKEN_INLINE uint64_t bits_of(double value) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(value));
#else
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

FORETOKEN_INLINE double double_of(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// High 64 bits of a 128-bit product.
FORETOKEN_INLINE uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  __extension__ typedef unsigned __int128 wide;
  return static_cast<uint64_t>((static_cast<wide>(a) * b) >> 64);
#endif
}

}  // namespace foretoken

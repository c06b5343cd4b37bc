#pragma once

#include "cuda_bf16.h"
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
  operator float() const { return foretoken::float_of_half(bits); }
};
struct __half2 {
  __half x, y;
};
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
inline __half2 __hmax2(__half2 a, __half2 b) { return {larger_half(a.x, b.x), larger_half(a.y, b.y)}; }
inline __half2 __hmin2(__half2 a, __half2 b) { return {smaller_half(a.x, b.x), smaller_half(a.y, b.y)}; }

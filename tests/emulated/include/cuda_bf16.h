#pragma once

#include "math/half.hpp"

struct __nv_bfloat16 {
  uint16_t bits;
  operator float() const { return foretoken::float_of_bfloat(bits); }
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
// NaN passed over where there is anything else.
template <class Half>
Half larger_half(Half a, Half b) {
  const float of_a = a, of_b = b;
  return of_a != of_a || of_b > of_a ? b : a;
}
template <class Half>
Half smaller_half(Half a, Half b) {
  const float of_a = a, of_b = b;
  return of_a != of_a || of_b < of_a ? b : a;
}
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {larger_half(a.x, b.x), larger_half(a.y, b.y)};
}
inline __nv_bfloat162 __hmin2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {smaller_half(a.x, b.x), smaller_half(a.y, b.y)};
}

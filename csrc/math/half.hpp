// float16 bits to float32, exactly, in arithmetic that vectorises everywhere.
#pragma once

#include "math/portability.hpp"

namespace foretoken {

// Moving the 15 value bits up leaves the exponent 112 too small; the product repairs it, subnormals too.
FORETOKEN_INLINE float float_of_half(uint32_t half) {
  const float magnitude = float_of((half & 0x7FFFu) << 13) * 0x1p112f;
  const uint32_t special = (half & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u;
  return float_of(bits_of(magnitude) | special | (half & 0x8000u) << 16);
}

FORETOKEN_INLINE float float_of_bfloat(uint32_t bits) { return float_of(bits << 16); }

}  // namespace foretoken

// 8-bit floats to float32, exactly.
#pragma once

#include "math/half.hpp"

namespace foretoken {

// 4 exponent bits, 3 mantissa bits, NaN where all seven are set, no infinities (torch.float8_e4m3fn). As with
// halves: the bits moved up leave the exponent too small, and the product repairs it, subnormals too.
FORETOKEN_INLINE float float_of_e4m3(uint32_t bits) {
  const float magnitude = float_of((bits & 0x7Fu) << 20) * 0x1p120f;
  const uint32_t special = (bits & 0x7Fu) == 0x7Fu ? 0x7FC00000u : 0u;
  return float_of(bits_of(magnitude) | special | (bits & 0x80u) << 24);
}

// The upper byte of a half.
FORETOKEN_INLINE float float_of_e5m2(uint32_t bits) { return float_of_half(bits << 8); }

}  // namespace foretoken

// 8-bit floats from and to float32, by integer arithmetic and single additions: the same bits everywhere.
#pragma once

#include "math/half.hpp"
#include "math/portability.hpp"

namespace foretoken {

// float8_e4m3fn: no infinities; 0x7F and 0xFF are NaN, 448 is the largest.
struct E4M3 {
  static constexpr int kMantissa = 3, kBias = 7;
  static constexpr uint32_t kLargest = 0x7E, kLargestFloat = 0x43E00000u;
};

struct E5M2 {
  static constexpr int kMantissa = 2, kBias = 15;
  static constexpr uint32_t kLargest = 0x7B, kLargestFloat = 0x47600000u;  // 57344
};

// The nearest number, of two the even one; what lies beyond the largest, infinities too, becomes the largest.
// NaN is 0x7F: which sign a computed NaN has is for a processor to choose.
template <class Format>
FORETOKEN_INLINE uint32_t float8_of(float value) {
  constexpr int kDropped = 23 - Format::kMantissa;
  constexpr uint32_t kRebias = static_cast<uint32_t>(127 - Format::kBias) << Format::kMantissa;
  constexpr uint32_t kLeastNormal = static_cast<uint32_t>(128 - Format::kBias) << 23;
  // Numbers of this size are as far apart as subnormals are: adding it rounds to one of them.
  constexpr uint32_t kSubnormalRounder = static_cast<uint32_t>(127 + kDropped + 1 - Format::kBias) << 23;
  const uint32_t bits = bits_of(value), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7FFFFFFFu;
  const uint32_t even = magnitude >> kDropped & 1u;
  const uint32_t normal = ((magnitude + ((1u << (kDropped - 1)) - 1u) + even) >> kDropped) - kRebias;
  const uint32_t subnormal = bits_of(float_of(magnitude) + float_of(kSubnormalRounder)) - kSubnormalRounder;
  uint32_t result = magnitude < kLeastNormal ? subnormal : normal;
  if (magnitude >= Format::kLargestFloat) result = Format::kLargest;
  return magnitude > 0x7F800000u ? 0x7Fu : result | sign;
}

FORETOKEN_INLINE float float_of_e4m3(uint32_t bits) {
  // Moving the seven value bits up leaves the exponent 120 too small; the product repairs it, subnormals too.
  const float magnitude = float_of((bits & 0x7Fu) << 20) * 0x1p120f;
  const uint32_t nan = (bits & 0x7Fu) == 0x7Fu ? 0x7FC00000u : 0u;
  return float_of(bits_of(magnitude) | nan | (bits & 0x80u) << 24);
}

// The upper half of a float16.
FORETOKEN_INLINE float float_of_e5m2(uint32_t bits) { return float_of_half((bits & 0xFFu) << 8); }

}  // namespace foretoken

// exp and log of our own. The libraries of two devices differ in the last bit, and one bit is enough to
// give two texts for one seed; every multiply-add below is therefore written out (no contraction).
#pragma once

#include "math/portability.hpp"

namespace foretoken {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

FORETOKEN_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// 2^(distance * scale) for distance * scale in [-126, 0.5]; exactly 1 at distance 0.
// Adding 1.5 * 2^23 rounds the exponent to an integer and leaves it in the low mantissa bits. The fraction
// comes from the exact product, so the error is that of the polynomial (9.2e-8) however large the exponent.
FORETOKEN_INLINE float exp2_scaled(float distance, float scale) {
  constexpr float kRound = 12582912.0f;
  const float shifted = fused(distance, scale, kRound);
  const float fraction = fused(distance, scale, -(shifted - kRound));
  float power = 0x1.5bba14p-10f;
  power = fused(power, fraction, 0x1.3cea88p-7f);
  power = fused(power, fraction, 0x1.c6b752p-5f);
  power = fused(power, fraction, 0x1.ebf9bcp-3f);
  power = fused(power, fraction, 0x1.62e42ap-1f);
  power = fused(power, fraction, 1.0f);
  return float_of(bits_of(power) + (bits_of(shifted) << 23));
}

// Natural logarithm of a positive, finite, normal double, to about one unit in the last place.
// log m = 2 atanh((m - 1) / (m + 1)) on [sqrt(1/2), sqrt(2)); eleven terms reach 2^-56 there.
FORETOKEN_INLINE double log_positive(double value) {
  const uint64_t bits = bits_of(value);
  int64_t exponent = static_cast<int64_t>(bits >> 52) - 1023;
  double mantissa = double_of((bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull);
  if (mantissa > 1.41421356237309504880) {
    mantissa *= 0.5;
    exponent += 1;
  }
  const double ratio = (mantissa - 1.0) / (mantissa + 1.0);
  const double square = ratio * ratio;
  double series = 0.0;
  for (int term = 10; term >= 0; --term) series = series * square + 1.0 / (2 * term + 1);
  return static_cast<double>(exponent) * kLn2 + 2.0 * ratio * series;
}

}  // namespace foretoken

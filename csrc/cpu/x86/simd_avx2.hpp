// The operations of simd_portable.hpp on eight lanes.
#pragma once

#include <immintrin.h>

#include "math/row_law.hpp"

namespace foretoken::cpu {
namespace {

constexpr bool kScalingKeepsNan = false;
constexpr bool kUnrollLaws = false;

struct Floats {
  static constexpr int kLanes = 8;
  __m256 lane;

  static Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Floats all(float value) { return {_mm256_set1_ps(value)}; }
  void store(float* p) const { _mm256_storeu_ps(p, lane); }
};

inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.lane, b.lane)}; }
inline Floats subtract(Floats a, Floats b) { return {_mm256_sub_ps(a.lane, b.lane)}; }
inline Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.lane, b.lane)}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.lane, b.lane, c.lane)}; }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) {
  return {_mm256_fmsub_ps(a.lane, b.lane, c.lane)};
}
// maxps and minps return the second operand if either is NaN: exactly `a > b ? a : b`.
inline Floats greater_of(Floats a, Floats b) { return {_mm256_max_ps(a.lane, b.lane)}; }
inline Floats lesser_of(Floats a, Floats b) { return {_mm256_min_ps(a.lane, b.lane)}; }
inline Floats unless_below(Floats x, Floats bound, Floats value) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.lane, bound.lane, _CMP_NLT_UQ), value.lane)};
}
inline Floats scale_unless_below(Floats x, Floats bound, Floats power, Floats shifted, Floats) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted.lane), 23);
  const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(power.lane), exponent);
  return unless_below(x, bound, {_mm256_castsi256_ps(scaled)});
}
inline Floats add_neighbours(Floats a, Floats b) {
  const __m256 mixed = _mm256_hadd_ps(a.lane, b.lane);  // a0+a1 a2+a3 b0+b1 b2+b3 | a4+a5 ...
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0b11011000))};
}
inline float add_halves(Floats a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.lane), _mm256_extractf128_ps(a.lane, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
struct NanSeen {
  __m256 seen = _mm256_setzero_ps();
  void add(Floats a, Floats b) { seen = _mm256_or_ps(seen, _mm256_cmp_ps(a.lane, b.lane, _CMP_UNORD_Q)); }
  bool any() const { return _mm256_movemask_ps(seen) != 0; }
};

// Adding 2^52 rounds to a whole number and leaves it in the mantissa.
inline __m256i shifted_masses(__m128 masses) {
  return _mm256_castpd_si256(_mm256_add_pd(_mm256_cvtps_pd(masses), _mm256_set1_pd(4503599627370496.0)));
}
inline __m128 low_half(Floats a) { return _mm256_castps256_ps128(a.lane); }
inline __m128 high_half(Floats a) { return _mm256_extractf128_ps(a.lane, 1); }

inline void store_masses(Floats masses, uint64_t* out) {
  const __m256i mantissa = _mm256_set1_epi64x(0x000FFFFFFFFFFFFFll);
  __m256i* to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_and_si256(shifted_masses(low_half(masses)), mantissa));
  _mm256_storeu_si256(to + 1, _mm256_and_si256(shifted_masses(high_half(masses)), mantissa));
}

struct MassSum {
  static constexpr uint64_t kShift = 0x4330000000000000ull;  // the bits of 2^52, taken off at the end
  __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
  uint64_t shifts = 0;
  void add(Floats masses) {
    low = _mm256_add_epi64(low, shifted_masses(low_half(masses)));
    high = _mm256_add_epi64(high, shifted_masses(high_half(masses)));
    shifts += Floats::kLanes * kShift;
  }
  uint64_t total() const {
    uint64_t lane[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lane), _mm256_add_epi64(low, high));
    return lane[0] + lane[1] + lane[2] + lane[3] - shifts;
  }
};

inline float largest_lane(Floats a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.lane), _mm256_extractf128_ps(a.lane, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline Floats load_bfloat(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline void load_bfloat_pairs(const uint16_t* p, Floats& even, Floats& odd) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-0x10000)))};
}
inline Floats load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline bool any_at_least(Floats x, float bound) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x.lane, _mm256_set1_ps(bound), _CMP_GE_OQ)) != 0;
}
inline int keep_between(Floats x, float low, float high, float* out) {
  float lane[Floats::kLanes];
  x.store(lane);
  int kept = 0;
  for (float value : lane) {
    out[kept] = value;
    kept += value >= low && value < high ? 1 : 0;
  }
  return kept;
}

struct Patterns {
  static constexpr int kLanes = 16;
  __m256i lane;

  static Patterns load(const uint16_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  static Patterns all(uint16_t bits) { return {_mm256_set1_epi16(static_cast<int16_t>(bits))}; }
};
inline Patterns greater_signed(Patterns a, Patterns b) { return {_mm256_max_epi16(a.lane, b.lane)}; }
inline Patterns lesser_unsigned(Patterns a, Patterns b) { return {_mm256_min_epu16(a.lane, b.lane)}; }
inline uint16_t least_unsigned(Patterns a) {
  const __m128i eight = _mm_min_epu16(_mm256_castsi256_si128(a.lane), _mm256_extracti128_si256(a.lane, 1));
  return static_cast<uint16_t>(_mm_extract_epi16(_mm_minpos_epu16(eight), 0));
}
inline uint16_t greatest_signed(Patterns a) {  // flipping these bits turns signed order into its reverse
  const __m256i flip = _mm256_set1_epi16(0x7FFF);
  return static_cast<uint16_t>(least_unsigned({_mm256_xor_si256(a.lane, flip)}) ^ 0x7FFF);
}

}  // namespace
}  // namespace foretoken::cpu

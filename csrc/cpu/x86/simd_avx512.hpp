// The operations of simd_portable.hpp on sixteen lanes.
#pragma once

#include <immintrin.h>

#include "math/row_law.hpp"

namespace foretoken::cpu {
namespace {

constexpr bool kScalingKeepsNan = true;
constexpr bool kUnrollLaws = true;

struct Floats {
  static constexpr int kLanes = 16;
  __m512 lane;

  static Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Floats all(float value) { return {_mm512_set1_ps(value)}; }
  void store(float* p) const { _mm512_storeu_ps(p, lane); }
};

inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.lane, b.lane)}; }
inline Floats subtract(Floats a, Floats b) { return {_mm512_sub_ps(a.lane, b.lane)}; }
inline Floats multiply(Floats a, Floats b) { return {_mm512_mul_ps(a.lane, b.lane)}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.lane, b.lane, c.lane)}; }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) {
  return {_mm512_fmsub_ps(a.lane, b.lane, c.lane)};
}
// maxps and minps return the second operand if either is NaN: exactly `a > b ? a : b`.
inline Floats greater_of(Floats a, Floats b) { return {_mm512_max_ps(a.lane, b.lane)}; }
inline Floats lesser_of(Floats a, Floats b) { return {_mm512_min_ps(a.lane, b.lane)}; }
inline Floats unless_below(Floats x, Floats bound, Floats value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.lane, bound.lane, _CMP_NLT_UQ), value.lane)};
}
inline Floats scale_unless_below(Floats x, Floats bound, Floats power, Floats, Floats whole) {
  const __mmask16 kept = _mm512_cmp_ps_mask(x.lane, bound.lane, _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(kept, power.lane, whole.lane)};
}
inline Floats add_neighbours(Floats a, Floats b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {_mm512_add_ps(_mm512_permutex2var_ps(a.lane, even, b.lane),
                        _mm512_permutex2var_ps(a.lane, odd, b.lane))};
}
inline float add_halves(Floats a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.lane), _mm512_extractf32x8_ps(a.lane, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
struct NanSeen {
  __mmask16 seen = 0;
  void add(Floats a, Floats b) {
    seen = static_cast<__mmask16>(seen | _mm512_cmp_ps_mask(a.lane, b.lane, _CMP_UNORD_Q));
  }
  bool any() const { return seen != 0; }
};

inline __m512i whole_masses(__m256 masses) {
  return _mm512_cvt_roundps_epi64(masses, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m256 low_half(Floats a) { return _mm512_castps512_ps256(a.lane); }
inline __m256 high_half(Floats a) { return _mm512_extractf32x8_ps(a.lane, 1); }

inline void store_masses(Floats masses, uint64_t* out) {
  _mm512_storeu_si512(out, whole_masses(low_half(masses)));
  _mm512_storeu_si512(out + 8, whole_masses(high_half(masses)));
}

struct MassSum {
  __m512i low = _mm512_setzero_si512(), high = _mm512_setzero_si512();
  void add(Floats masses) {
    low = _mm512_add_epi64(low, whole_masses(low_half(masses)));
    high = _mm512_add_epi64(high, whole_masses(high_half(masses)));
  }
  uint64_t total() const {
    return static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(low, high)));
  }
};

inline float largest_lane(Floats a) { return _mm512_reduce_max_ps(a.lane); }

inline Floats load_bfloat(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline void load_bfloat_pairs(const uint16_t* p, Floats& even, Floats& odd) {
  const __m512i bits = _mm512_loadu_si512(p);
  even = {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
  odd = {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-0x10000)))};
}
inline Floats load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline bool any_at_least(Floats x, float bound) {
  return _mm512_cmp_ps_mask(x.lane, _mm512_set1_ps(bound), _CMP_GE_OQ) != 0;
}
inline int keep_between(Floats x, float low, float high, float* out) {
  const __mmask16 above = _mm512_cmp_ps_mask(x.lane, _mm512_set1_ps(low), _CMP_GE_OQ);
  const __mmask16 kept = _mm512_mask_cmp_ps_mask(above, x.lane, _mm512_set1_ps(high), _CMP_LT_OQ);
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(kept, x.lane));
  return __builtin_popcount(kept);
}

struct Patterns {
  static constexpr int kLanes = 32;
  __m512i lane;

  static Patterns load(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
  static Patterns all(uint16_t bits) { return {_mm512_set1_epi16(static_cast<int16_t>(bits))}; }
};
inline Patterns greater_signed(Patterns a, Patterns b) { return {_mm512_max_epi16(a.lane, b.lane)}; }
inline Patterns lesser_unsigned(Patterns a, Patterns b) { return {_mm512_min_epu16(a.lane, b.lane)}; }
inline uint16_t least_unsigned(Patterns a) {
  const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(a.lane), _mm512_extracti64x4_epi64(a.lane, 1));
  const __m128i eight = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return static_cast<uint16_t>(_mm_extract_epi16(_mm_minpos_epu16(eight), 0));
}
inline uint16_t greatest_signed(Patterns a) {
  const __m512i flip = _mm512_set1_epi16(0x7FFF);
  return static_cast<uint16_t>(least_unsigned({_mm512_xor_si512(a.lane, flip)}) ^ 0x7FFF);
}

}  // namespace
}  // namespace foretoken::cpu

// The operations of simd_portable.hpp on sixteen lanes.
#pragma once

#include <immintrin.h>

#include "math/row_law.hpp"

namespace foretoken::cpu {
namespace {

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
// maxps and minps return the second operand if either is NaN: exactly `a > b ? a : b`.
inline Floats greater_of(Floats a, Floats b) { return {_mm512_max_ps(a.lane, b.lane)}; }
inline Floats lesser_of(Floats a, Floats b) { return {_mm512_min_ps(a.lane, b.lane)}; }
inline Floats unless_below(Floats x, Floats bound, Floats value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.lane, bound.lane, _CMP_NLT_UQ), value.lane)};
}
inline Floats scale_unless_below(Floats x, Floats bound, Floats power, Floats shifted) {
  const __mmask16 kept = _mm512_cmp_ps_mask(x.lane, bound.lane, _CMP_NLT_UQ);
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted.lane), 23);
  return {_mm512_castsi512_ps(_mm512_maskz_add_epi32(kept, _mm512_castps_si512(power.lane), exponent))};
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

inline __m512i masses_of(__m256 weights) {
  const __m512d shifted = _mm512_add_pd(_mm512_mul_pd(_mm512_cvtps_pd(weights), _mm512_set1_pd(kMassUnit)),
                                        _mm512_set1_pd(4503599627370496.0));
  return _mm512_and_epi64(_mm512_castpd_si512(shifted), _mm512_set1_epi64(0x000FFFFFFFFFFFFFll));
}
inline __m256 low_half(Floats a) { return _mm512_castps512_ps256(a.lane); }
inline __m256 high_half(Floats a) { return _mm512_extractf32x8_ps(a.lane, 1); }

inline void store_masses(Floats weights, uint64_t* out) {
  _mm512_storeu_si512(out, masses_of(low_half(weights)));
  _mm512_storeu_si512(out + 8, masses_of(high_half(weights)));
}

struct MassSum {
  __m512i low = _mm512_setzero_si512(), high = _mm512_setzero_si512();
  void add(Floats weights) {
    low = _mm512_add_epi64(low, masses_of(low_half(weights)));
    high = _mm512_add_epi64(high, masses_of(high_half(weights)));
  }
  uint64_t total() const {
    return static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(low, high)));
  }
};

inline Floats load_bfloat(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Floats load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline int keep_at_least(Floats x, float bound, float* out) {
  const __mmask16 kept = _mm512_cmp_ps_mask(x.lane, _mm512_set1_ps(bound), _CMP_GE_OQ);
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(kept, x.lane));
  return __builtin_popcount(kept);
}

}  // namespace
}  // namespace foretoken::cpu

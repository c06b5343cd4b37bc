// Sixteen floats in an AVX-512 register.
#pragma once

#include <immintrin.h>

#include <limits>

#include "cpu/attention_kernels.hpp"

namespace foretoken::cpu {
namespace {

constexpr int kScoreRows = 8, kMixRows = 8;
constexpr int64_t kScoreDepth = 64;

struct Vec {
  static constexpr int kLanes = 16;
  __m512 lane;

  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, lane); }
  static Vec all(float value) { return {_mm512_set1_ps(value)}; }
  static Vec zero() { return {_mm512_setzero_ps()}; }

  static Vec widen(Kind<DType::float32>, const char* p) { return {_mm512_loadu_ps(p)}; }
  static Vec widen(Kind<DType::bfloat16>, const char* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static Vec widen(Kind<DType::float16>, const char* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec widen(Kind<DType::float8_e4m3>, const char* p) {
    const __m512i bits = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i low = _mm512_and_si512(bits, _mm512_set1_epi32(0x7F));
    const __m512 size =
        _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(low, 20)), _mm512_set1_ps(0x1p120f));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(low, _mm512_set1_epi32(0x7F));
    const __m512i number =
        _mm512_mask_mov_epi32(_mm512_castps_si512(size), nan, _mm512_set1_epi32(0x7FC00000));
    const __m512i sign = _mm512_slli_epi32(_mm512_sub_epi32(bits, low), 24);
    return {_mm512_castsi512_ps(_mm512_or_si512(number, sign))};
  }
  static Vec widen(Kind<DType::float8_e5m2>, const char* p) {
    const __m256i bits = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm512_cvtph_ps(_mm256_slli_epi16(bits, 8))};
  }

  void narrow(Kind<DType::float32>, char* p) const { _mm512_storeu_ps(p, lane); }
  void narrow(Kind<DType::bfloat16>, char* p) const {
    const __m512i bits = _mm512_castps_si512(lane);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(lane, lane, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_mask_or_epi32(nearest, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16)));
  }
  void narrow(Kind<DType::float16>, char* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(lane, _MM_FROUND_TO_NEAREST_INT));
  }
};

inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.lane, b.lane)}; }
inline Vec subtract(Vec a, Vec b) { return {_mm512_sub_ps(a.lane, b.lane)}; }
inline Vec multiply(Vec a, Vec b) { return {_mm512_mul_ps(a.lane, b.lane)}; }
inline Vec divide(Vec a, Vec b) { return {_mm512_div_ps(a.lane, b.lane)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.lane, b.lane, c.lane)}; }
// a where it is greater, else b.
inline Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.lane, b.lane)}; }
inline Vec where_less(Vec x, Vec bound, Vec yes, Vec no) {
  return {_mm512_mask_mov_ps(no.lane, _mm512_cmp_ps_mask(x.lane, bound.lane, _CMP_LT_OQ), yes.lane)};
}
inline Vec absolute(Vec a) { return {_mm512_abs_ps(a.lane)}; }
inline Vec with_sign_of(Vec size, Vec sign) {
  const __m512i bit =
      _mm512_and_si512(_mm512_castps_si512(sign.lane), _mm512_set1_epi32(static_cast<int>(0x80000000u)));
  return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(size.lane), bit))};
}
inline Vec nearest_whole(Vec a) {
  return {_mm512_roundscale_ps(a.lane, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec times_power_of_two(Vec power, Vec whole) { return {_mm512_scalef_ps(power.lane, whole.lane)}; }
// The two bfloat16 of a lane.
inline Vec lower_bfloat(Vec a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.lane), 16))};
}
inline Vec upper_bfloat(Vec a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.lane), _mm512_set1_epi32(-0x10000)))};
}
inline float first_of(Vec a) { return _mm512_cvtss_f32(a.lane); }
inline float sum_of(Vec a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.lane), _mm512_extractf32x8_ps(a.lane, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest_of(Vec a) { return _mm512_reduce_max_ps(a.lane); }
inline void unless_unseen(float* scores, const uint32_t* seen) {
  const __m512i words = _mm512_loadu_si512(seen);
  const __mmask16 unseen = _mm512_testn_epi32_mask(words, words);
  _mm512_mask_storeu_ps(scores, unseen, _mm512_set1_ps(-std::numeric_limits<float>::infinity()));
}

inline void transpose(Vec* lines) {
  __m512 pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(lines[i].lane, lines[i + 1].lane);
    pairs[i + 1] = _mm512_unpackhi_ps(lines[i].lane, lines[i + 1].lane);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m512d low = _mm512_castps_pd(pairs[i + half]), high = _mm512_castps_pd(pairs[i + 2 + half]);
      fours[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      fours[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // fours[4 k + j] holds, in its quarter q, element 4 q + j of lines 4 k to 4 k + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512 low = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xDD);
    const __m512 more_low = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88);
    const __m512 more_high = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xDD);
    lines[j].lane = _mm512_shuffle_f32x4(low, more_low, 0x88);
    lines[8 + j].lane = _mm512_shuffle_f32x4(low, more_low, 0xDD);
    lines[4 + j].lane = _mm512_shuffle_f32x4(high, more_high, 0x88);
    lines[12 + j].lane = _mm512_shuffle_f32x4(high, more_high, 0xDD);
  }
}

}  // namespace
}  // namespace foretoken::cpu

// Eight floats in an AVX2 register.
#pragma once

#include <immintrin.h>

#include <limits>

#include "cpu/attention_kernels.hpp"

namespace foretoken::cpu {
namespace {

constexpr int kScoreRows = 6, kMixRows = 6;
constexpr int64_t kScoreDepth = 64;

struct Vec {
  static constexpr int kLanes = 8;
  __m256 lane;

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, lane); }
  static Vec all(float value) { return {_mm256_set1_ps(value)}; }
  static Vec zero() { return {_mm256_setzero_ps()}; }

  static Vec widen(Kind<DType::float32>, const char* p) {
    return {_mm256_loadu_ps(reinterpret_cast<const float*>(p))};
  }
  static Vec widen(Kind<DType::bfloat16>, const char* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static Vec widen(Kind<DType::float16>, const char* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static Vec widen(Kind<DType::float8_e4m3>, const char* p) {
    const __m256i bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i low = _mm256_and_si256(bits, _mm256_set1_epi32(0x7F));
    const __m256 size =
        _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(low, 20)), _mm256_set1_ps(0x1p120f));
    const __m256i nan = _mm256_cmpeq_epi32(low, _mm256_set1_epi32(0x7F));
    const __m256i number = _mm256_blendv_epi8(_mm256_castps_si256(size), _mm256_set1_epi32(0x7FC00000), nan);
    const __m256i sign = _mm256_slli_epi32(_mm256_sub_epi32(bits, low), 24);
    return {_mm256_castsi256_ps(_mm256_or_si256(number, sign))};
  }
  static Vec widen(Kind<DType::float8_e5m2>, const char* p) {
    const __m128i bits = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_cvtph_ps(_mm_slli_epi16(bits, 8))};
  }

  void narrow(Kind<DType::float32>, char* p) const { _mm256_storeu_ps(reinterpret_cast<float*>(p), lane); }
  void narrow(Kind<DType::bfloat16>, char* p) const {
    const __m256i bits = _mm256_castps_si256(lane);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(lane, lane, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(nearest, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  void narrow(Kind<DType::float16>, char* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(lane, _MM_FROUND_TO_NEAREST_INT));
  }
};

inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lane, b.lane)}; }
inline Vec subtract(Vec a, Vec b) { return {_mm256_sub_ps(a.lane, b.lane)}; }
inline Vec multiply(Vec a, Vec b) { return {_mm256_mul_ps(a.lane, b.lane)}; }
inline Vec divide(Vec a, Vec b) { return {_mm256_div_ps(a.lane, b.lane)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lane, b.lane, c.lane)}; }
// a where it is greater, else b.
inline Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.lane, b.lane)}; }
inline Vec where_less(Vec x, Vec bound, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.lane, yes.lane, _mm256_cmp_ps(x.lane, bound.lane, _CMP_LT_OQ))};
}
inline Vec absolute(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.lane)}; }
inline Vec with_sign_of(Vec size, Vec sign) {
  return {_mm256_or_ps(size.lane, _mm256_and_ps(_mm256_set1_ps(-0.0f), sign.lane))};
}
inline Vec nearest_whole(Vec a) {
  return {_mm256_round_ps(a.lane, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// Of a normal result.
inline Vec times_power_of_two(Vec power, Vec whole) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole.lane), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power.lane), exponent))};
}
// The two bfloat16 of a lane.
inline Vec lower_bfloat(Vec a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.lane), 16))};
}
inline Vec upper_bfloat(Vec a) {
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(a.lane), _mm256_set1_epi32(-0x10000)))};
}
inline float first_of(Vec a) { return _mm256_cvtss_f32(a.lane); }
inline float sum_of(Vec a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.lane), _mm256_extractf128_ps(a.lane, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest_of(Vec a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.lane), _mm256_extractf128_ps(a.lane, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline void unless_unseen(float* scores, const uint32_t* seen) {
  const __m256 words = _mm256_loadu_ps(reinterpret_cast<const float*>(seen));  // all ones or zero
  const __m256 hidden = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
  _mm256_storeu_ps(scores, _mm256_blendv_ps(hidden, _mm256_loadu_ps(scores), words));
}

inline void transpose(Vec* lines) {
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(lines[i].lane, lines[i + 1].lane);
    pairs[i + 1] = _mm256_unpackhi_ps(lines[i].lane, lines[i + 1].lane);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int half = 0; half < 2; ++half) {
      fours[i + 2 * half] = _mm256_shuffle_ps(pairs[i + half], pairs[i + 2 + half], 0x44);
      fours[i + 2 * half + 1] = _mm256_shuffle_ps(pairs[i + half], pairs[i + 2 + half], 0xEE);
    }
  }
  for (int j = 0; j < 4; ++j) {
    lines[j].lane = _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x20);
    lines[4 + j].lane = _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x31);
  }
}

}  // namespace
}  // namespace foretoken::cpu

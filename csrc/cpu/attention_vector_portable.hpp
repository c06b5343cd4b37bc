// Four floats and what attention does with them, for any processor: the compiler's own vectors.
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/attention_kernels.hpp"
#include "math/float8.hpp"

namespace foretoken::cpu {
namespace {

constexpr int kScoreRows = 4, kMixRows = 4;
constexpr int64_t kScoreDepth = 16;

uint16_t bfloat_of(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

uint16_t half_of(float value) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (magnitude < 0x38800000u) {  // a subnormal half: adding 0.5 rounds to multiples of 2^-24
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13));
}

struct Vec {
  static constexpr int kLanes = 4;
  typedef float Lanes __attribute__((vector_size(16)));
  typedef int32_t Masks __attribute__((vector_size(16)));
  Lanes lane;

  static Vec load(const float* p) {
    Vec result;
    std::memcpy(&result.lane, p, sizeof result.lane);
    return result;
  }
  void store(float* p) const { std::memcpy(p, &lane, sizeof lane); }
  static Vec all(float value) { return {Lanes{value, value, value, value}}; }
  static Vec zero() { return all(0.0f); }

  template <class Element, class Convert>
  static Vec convert(const char* p, Convert convert) {
    Element bits[kLanes];
    std::memcpy(bits, p, sizeof bits);
    return {Lanes{convert(bits[0]), convert(bits[1]), convert(bits[2]), convert(bits[3])}};
  }
  static Vec widen(Kind<DType::float32>, const char* p) {
    Vec result;
    std::memcpy(&result.lane, p, sizeof result.lane);
    return result;
  }
  static Vec widen(Kind<DType::bfloat16>, const char* p) { return convert<uint16_t>(p, float_of_bfloat); }
  static Vec widen(Kind<DType::float16>, const char* p) { return convert<uint16_t>(p, float_of_half); }
  static Vec widen(Kind<DType::float8_e4m3>, const char* p) { return convert<uint8_t>(p, float_of_e4m3); }
  static Vec widen(Kind<DType::float8_e5m2>, const char* p) { return convert<uint8_t>(p, float_of_e5m2); }

  void narrow(Kind<DType::float32>, char* p) const { std::memcpy(p, &lane, sizeof lane); }
  void narrow(Kind<DType::bfloat16>, char* p) const {
    for (int i = 0; i < kLanes; ++i) {
      const uint16_t bits = bfloat_of(lane[i]);
      std::memcpy(p + 2 * i, &bits, sizeof bits);
    }
  }
  void narrow(Kind<DType::float16>, char* p) const {
    for (int i = 0; i < kLanes; ++i) {
      const uint16_t bits = half_of(lane[i]);
      std::memcpy(p + 2 * i, &bits, sizeof bits);
    }
  }
};

inline Vec add(Vec a, Vec b) { return {a.lane + b.lane}; }
inline Vec subtract(Vec a, Vec b) { return {a.lane - b.lane}; }
inline Vec multiply(Vec a, Vec b) { return {a.lane * b.lane}; }
inline Vec divide(Vec a, Vec b) { return {a.lane / b.lane}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {a.lane * b.lane + c.lane}; }
inline Vec chosen(Vec::Masks mask, Vec yes, Vec no) {
  return {reinterpret_cast<Vec::Lanes>((mask & reinterpret_cast<Vec::Masks>(yes.lane)) |
                                       (~mask & reinterpret_cast<Vec::Masks>(no.lane)))};
}
// a where it is greater, else b.
inline Vec larger(Vec a, Vec b) { return chosen(a.lane > b.lane, a, b); }
inline Vec where_less(Vec x, Vec bound, Vec yes, Vec no) { return chosen(x.lane < bound.lane, yes, no); }
inline Vec absolute(Vec a) {
  return {reinterpret_cast<Vec::Lanes>(reinterpret_cast<Vec::Masks>(a.lane) & 0x7FFFFFFF)};
}
inline Vec with_sign_of(Vec size, Vec sign) {
  const Vec::Masks bit = reinterpret_cast<Vec::Masks>(sign.lane) & static_cast<int32_t>(0x80000000u);
  return {reinterpret_cast<Vec::Lanes>(reinterpret_cast<Vec::Masks>(size.lane) | bit)};
}
// Of |a| < 2^22.
inline Vec nearest_whole(Vec a) {
  const Vec magic = Vec::all(12582912.0f);
  return subtract(add(a, magic), magic);
}
// Of a normal result. The factor is built from the low bits that adding 1.5 * 2^23 leaves the whole number
// in.
inline Vec times_power_of_two(Vec power, Vec whole) {
  const Vec::Masks bits = reinterpret_cast<Vec::Masks>(add(whole, Vec::all(12582912.0f)).lane);
  return {power.lane * reinterpret_cast<Vec::Lanes>((bits + 127) << 23)};
}
// The two bfloat16 of a lane.
inline Vec lower_bfloat(Vec a) {
  return {reinterpret_cast<Vec::Lanes>(reinterpret_cast<Vec::Masks>(a.lane) << 16)};
}
inline Vec upper_bfloat(Vec a) {
  return {reinterpret_cast<Vec::Lanes>(reinterpret_cast<Vec::Masks>(a.lane) & -0x10000)};
}
inline float first_of(Vec a) { return a.lane[0]; }
inline float sum_of(Vec a) { return (a.lane[0] + a.lane[2]) + (a.lane[1] + a.lane[3]); }
inline float largest_of(Vec a) {
  float most = a.lane[0];
  for (int i = 1; i < Vec::kLanes; ++i) most = a.lane[i] > most ? a.lane[i] : most;
  return most;
}
inline void unless_unseen(float* scores, const uint32_t* seen) {
  for (int i = 0; i < Vec::kLanes; ++i) scores[i] = seen[i] != 0 ? scores[i] : -INFINITY;
}
inline void transpose(Vec* lines) {
  for (int i = 0; i < Vec::kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float swapped = lines[i].lane[j];
      lines[i].lane[j] = lines[j].lane[i];
      lines[j].lane[i] = swapped;
    }
  }
}

}  // namespace
}  // namespace foretoken::cpu

// A row of the sampling law, reduced to the few numbers from which every probability of it follows.
// Nothing is ever renormalised to memory: a probability is weight(x) / mass, evaluated where it is needed.
#pragma once

#include "math/exp_log.hpp"

namespace foretoken {

constexpr int kTile = 1024;  // elements summed together, in a fixed order, in float32
constexpr int64_t kMaxVocab =
    (int64_t{1} << 20) - 1;                     // so that the mass of a row of equal logits fits 64 bits
constexpr double kMassUnit = 17592186044416.0;  // 2^44: what has 2^-44 of the largest stays possible

enum class LawKind : uint8_t {
  point,   // all mass on `top`
  logits,  // weight(x) = 2^((x - max) * scale)
  probs,   // weight(x) = x * scale, scale = 1 / max
};

struct RowLaw {
  LawKind kind = LawKind::point;
  bool usable = true;  // false: NaN or an infinity in the row, or nothing in it
  float max = 0.0f;    // largest element
  float scale = 0.0f;  // log2(e) / temperature
  float cut = 0.0f;    // elements below have weight 0: filtered, or too small to have a float32 weight
  int64_t top = -1;    // lowest id among the largest; set for point laws and unusable rows only
  uint64_t mass = 0;   // sum of the weights at or above cut, in units of 2^-44
};

FORETOKEN_INLINE float logits_scale(float temperature) {
  const double scale = kLog2E / static_cast<double>(temperature);
  return scale < 1e30 ? static_cast<float>(scale) : 1e30f;
}

// Below this a weight would leave the normal float32 range; such a token has far less than 2^-44 of the top.
FORETOKEN_INLINE float logits_floor(float max, float scale) {
  return static_cast<float>(static_cast<double>(max) - 125.0 / static_cast<double>(scale));
}

// A law as four words, so that whoever drew from it can hand over the very bits. Word 0: kind in byte 0,
// usable in byte 1, max above; word 1: scale, cut above; word 2: mass; word 3: top.
constexpr int kRecordWords = 4;

FORETOKEN_INLINE void write_record(const RowLaw& law, int64_t* record, int64_t stride) {
  const uint64_t flags = static_cast<uint64_t>(law.kind) | (law.usable ? 1u << 8 : 0u);
  record[0] = static_cast<int64_t>(flags | static_cast<uint64_t>(bits_of(law.max)) << 32);
  record[stride] = static_cast<int64_t>(bits_of(law.scale) | static_cast<uint64_t>(bits_of(law.cut)) << 32);
  record[2 * stride] = static_cast<int64_t>(law.mass);
  record[3 * stride] = law.top;
}

// What no row of `size` elements could have written is not usable; so garbage is a bad draft, not a fault.
FORETOKEN_INLINE RowLaw read_record(const int64_t* record, int64_t stride, int64_t size) {
  const uint64_t first = static_cast<uint64_t>(record[0]), second = static_cast<uint64_t>(record[stride]);
  RowLaw law;
  law.usable = (first & 0xFFFFFF00u) == 1u << 8;
  law.max = float_of(static_cast<uint32_t>(first >> 32));
  law.scale = float_of(static_cast<uint32_t>(second));
  law.cut = float_of(static_cast<uint32_t>(second >> 32));
  law.mass = static_cast<uint64_t>(record[2 * stride]);
  law.kind = (first & 0xFFu) == static_cast<uint64_t>(LawKind::point) ? LawKind::point : LawKind::logits;
  if (law.kind == LawKind::point) {
    const int64_t top = record[3 * stride];  // an element's number, which nobody is to see unchecked
    law.usable = law.usable && top >= 0 && top < size;
    law.top = law.usable ? top : -1;
    return law;
  }
  // The negated comparisons refuse NaN as well; the largest element alone weighs kMassUnit.
  if (!(law.max < 3e38f && law.max > -3e38f) || !(law.scale > 0.0f && law.scale <= 1e30f) ||
      !(law.cut <= law.max && law.cut >= logits_floor(law.max, law.scale)) ||
      law.mass < static_cast<uint64_t>(kMassUnit * 0.9) ||
      (first & 0xFFu) != static_cast<uint64_t>(LawKind::logits)) {
    law.usable = false;
  }
  return law;
}

// A NaN is not below the cut: it comes through, and makes the sum of its tile a NaN.
FORETOKEN_INLINE float weight_of_logit(float logit, float max, float scale, float cut) {
  const float weight = exp2_scaled(logit - max, scale);
  return logit < cut ? 0.0f : weight;
}

FORETOKEN_INLINE float weight_of_prob(float prob, float scale, float cut) {
  const float weight = prob * scale;
  return prob < cut ? 0.0f : weight;
}

FORETOKEN_INLINE float weight_in(const RowLaw& law, float element) {
  return law.kind == LawKind::probs ? weight_of_prob(element, law.scale, law.cut)
                                    : weight_of_logit(element, law.max, law.scale, law.cut);
}

// Nearest whole number of mass units for a weight in [0, 1]; adding 2^52 rounds half to even, exactly.
FORETOKEN_INLINE uint64_t mass_of(float weight) {
#if defined(__CUDA_ARCH__)
  return __float2ull_rn(weight * static_cast<float>(kMassUnit));  // the same: a power of two changes no digit
#else
  return bits_of(static_cast<double>(weight) * kMassUnit + 4503599627370496.0) & 0x000FFFFFFFFFFFFFull;
#endif
}

// A tile's float32 sum, taken relative to the tile's largest element, in mass units of the row.
FORETOKEN_INLINE uint64_t mass_of_tile(float sum, float tile_weight) {
  return static_cast<uint64_t>(static_cast<double>(sum) * static_cast<double>(tile_weight) * kMassUnit + 0.5);
}

FORETOKEN_INLINE double probability_in(const RowLaw& law, float element) {
  return static_cast<double>(weight_in(law, element)) * kMassUnit / static_cast<double>(law.mass);
}

}  // namespace foretoken

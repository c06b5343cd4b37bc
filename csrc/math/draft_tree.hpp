// What a drafter's tokens are ranked by while a tree grows from them and when it is cut to size.
#pragma once

#include "math/row_law.hpp"

namespace foretoken {

constexpr int kMaxChildren = 16;      // of one node, from one row of logits
constexpr int kMaxCandidates = 1024;  // of a tree, before it is cut to size

// Larger words are better: the larger value first, then the lower index. The two zeros are one value.
FORETOKEN_INLINE uint64_t rank_word(float value, uint32_t index) {
  const uint32_t bits = bits_of(value + 0.0f);
  const uint32_t key = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(key) << 32 | (0xFFFFFFFFu - index);
}

FORETOKEN_INLINE float value_in(uint64_t word) {
  const uint32_t key = static_cast<uint32_t>(word >> 32);
  return float_of((key & 0x80000000u) != 0 ? key & 0x7FFFFFFFu : ~key);
}

FORETOKEN_INLINE uint32_t index_in(uint64_t word) { return 0xFFFFFFFFu - static_cast<uint32_t>(word); }

FORETOKEN_INLINE bool is_finite(float value) { return value > -__builtin_inff() && value < __builtin_inff(); }

// Cumulative log-probability of a child: never above its parent's, as no part of the sum is. `log_mass`: of
// the law's mass over the weight of its largest element.
FORETOKEN_INLINE float child_score(float score, float logit, const RowLaw& law, double log_mass) {
  const double exponent =
      (static_cast<double>(logit) - static_cast<double>(law.max)) * static_cast<double>(law.scale) * kLn2;
  return static_cast<float>(static_cast<double>(score) + (exponent - log_mass));
}

FORETOKEN_INLINE double log_of_mass(uint64_t mass) {
  return log_positive(static_cast<double>(mass) / kMassUnit);
}

}  // namespace foretoken

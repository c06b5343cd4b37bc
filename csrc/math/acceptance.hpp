// The decisions of verification, written once for every device.
#pragma once

#include "math/portability.hpp"

namespace foretoken {

constexpr double kCoinUnit = 1.0 / 4294967296.0;

// Token rule, "Fast inference from transformers via speculative decoding" (Leviathan et al. 2023,
// section 2.3). Strict: uniform < 1 keeps every token on which both laws agree, and a token the target
// forbids is dropped even by a coin of 0. The coin stays an integer: rounded to float32 its top 128 values
// would become 1.
FORETOKEN_INLINE bool accepts_token(uint32_t coin, double target_prob, double draft_prob) {
  return static_cast<double>(coin) * kCoinUnit * draft_prob < target_prob;
}

FORETOKEN_INLINE bool accepts_fraction(uint32_t coin, double fraction) {
  return static_cast<double>(coin) * kCoinUnit < fraction;
}

// Block rule, "Block verification accelerates speculative decoding" (Sun et al. 2024, algorithm 2).
// P_i = min(1, P_{i-1} * target / draft): the probability with which the first i drafts are kept.
FORETOKEN_INLINE double extend_prefix(double prefix, double target_prob, double draft_prob) {
  const double product = prefix * target_prob;
  return product >= draft_prob ? 1.0 : product / draft_prob;
}

// h_i = S_i / (S_i + 1 - P_i), S_i being the mass of [P_i * target - draft]+ over the next row; 0/0 = 1.
FORETOKEN_INLINE double block_fraction(double prefix, double residual) {
  const double denominator = residual + (1.0 - prefix);
  return denominator > 0.0 ? residual / denominator : 1.0;
}

// [target - gain * draft]+ counted in target weights is [weight_t - this * weight_d]+.
FORETOKEN_INLINE float gain_in_weights(double gain, uint64_t target_mass, uint64_t draft_mass) {
  const double in_weights = gain * (static_cast<double>(target_mass) / static_cast<double>(draft_mass));
  return in_weights < 3e38 ? static_cast<float>(in_weights) : 3e38f;  // finite, so that gain * 0 is 0
}

// Typical acceptance, "Medusa: simple LLM inference acceleration framework with multiple decoding heads" (Cai
// et al. 2024, section 2.3.1). `typical` = delta * exp(-entropy) of the target's row.
FORETOKEN_INLINE bool accepts_typical(double target_prob, double epsilon, double typical) {
  return target_prob > (epsilon < typical ? epsilon : typical);
}

}  // namespace foretoken

// Gumbel noise keyed by position and token id: whoever asks for the token at a position gets the same noise,
// so a drafter and the target that share a seed tend to pick the same token, and the text is the target's
// alone.
//
// argmax(log weight + Gumbel) is the winner of a race: token v finishes at E_v / weight_v, E_v exponential.
#pragma once

#include "math/exp_log.hpp"
#include "math/philox.hpp"

namespace foretoken {

// Two neighbours share one Philox call.
FORETOKEN_INLINE uint64_t gumbel_bits(const PhiloxWords& words, int64_t token) {
  const int high = token % 2 == 0 ? 1 : 3;
  return static_cast<uint64_t>(words.word[high]) << 32 | words.word[high - 1];
}

FORETOKEN_INLINE PhiloxWords gumbel_words(uint64_t seed, uint64_t position, int64_t token) {
  return random_words(seed, position, Purpose::gumbel, 0, static_cast<uint32_t>(token / 2));
}

// Uniform in (0, 1): never 1, so that its exponential is finite.
FORETOKEN_INLINE double race_uniform(uint64_t bits) {
  const double uniform = (static_cast<double>(bits) + 0.5) * 5.421010862427522170e-20;  // 2^-64
  return uniform < 0.99999999999999988898 ? uniform : 0.99999999999999988898;           // 1 - 2^-53
}

// -log(1 - uniform), accurate where it matters: early finishers have a tiny uniform.
FORETOKEN_INLINE double race_exponential(double uniform) {
  if (uniform < 0x1p-10) {
    double series = 1.0 / 6.0;
    for (int term = 5; term >= 1; --term) series = series * uniform + 1.0 / term;
    return uniform * series;
  }
  return -log_positive(1.0 - uniform);
}

// log(E / weight): the smallest wins, the lowest id on ties.
FORETOKEN_INLINE double race_time(double uniform, double log_weight) {
  return log_positive(race_exponential(uniform)) - log_weight;
}

}  // namespace foretoken

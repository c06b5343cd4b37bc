// Every shared function once, on one set of arguments: what two devices have to agree on, bit for bit.
#pragma once

#include "math/acceptance.hpp"
#include "math/exp_log.hpp"
#include "math/half.hpp"
#include "math/philox.hpp"
#include "math/row_law.hpp"

namespace foretoken {

struct SelfCheckInput {
  uint64_t key;
  uint64_t other;
  uint32_t counter[4];
  float distance;     // <= 0, a logit minus the row's largest
  float scale;        // > 0, log2(e) / temperature
  double positive;    // a normal number
  float target_prob;  // in [0, 1]
  float draft_prob;   // in (0, 1]
};

// Integers alone: floating point results as their bits, so that equality is exact and -0 differs from 0.
struct SelfCheckOutput {
  uint64_t philox_low, philox_high;
  uint64_t multiply_high;
  uint64_t exp2;
  uint64_t log;
  uint64_t half, bfloat;
  uint64_t mass, tile_mass, floor;
  uint64_t accepts;
  uint64_t prefix, fraction, gain;
};

constexpr int kSelfCheckWords = sizeof(SelfCheckOutput) / sizeof(uint64_t);

FORETOKEN_INLINE SelfCheckOutput self_check(const SelfCheckInput& in) {
  SelfCheckOutput out;
  const PhiloxWords words = philox4x32(in.key, in.counter[0], in.counter[1], in.counter[2], in.counter[3]);
  out.philox_low = static_cast<uint64_t>(words.word[1]) << 32 | words.word[0];
  out.philox_high = static_cast<uint64_t>(words.word[3]) << 32 | words.word[2];
  out.multiply_high = multiply_high(in.key, in.other);
  const float weight = exp2_scaled(in.distance, in.scale);
  out.exp2 = bits_of(weight);
  out.log = bits_of(log_positive(in.positive));
  out.half = bits_of(float_of_half(in.counter[0] & 0xFFFFu));
  out.bfloat = bits_of(float_of_bfloat(in.counter[0] & 0xFFFFu));
  out.mass = mass_of(weight);
  out.tile_mass = mass_of_tile(weight * 1000.0f, in.draft_prob);
  out.floor = bits_of(logits_floor(in.distance, in.scale));
  const double target = in.target_prob;
  const double draft = in.draft_prob;
  const double prefix = extend_prefix(draft, target, draft);
  out.accepts = (accepts_token(in.counter[1], target, draft) ? 1u : 0u) |
                (accepts_fraction(in.counter[2], target) ? 2u : 0u);
  out.prefix = bits_of(prefix);
  out.fraction = bits_of(block_fraction(prefix, target));
  out.gain = bits_of(gain_in_weights(draft, in.key >> 20 | 1, in.other >> 20 | 1));
  return out;
}

}  // namespace foretoken

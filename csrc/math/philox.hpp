// Philox4x32-10 ("Parallel random numbers: as easy as 1, 2, 3", Salmon et al. 2011, section 4.3) and the
// one way foretoken spends it: key = the request's seed, counter = who asks for what in which round.
#pragma once

#include "math/portability.hpp"

namespace foretoken {

struct PhiloxWords {
  uint32_t word[4];
};

FORETOKEN_INLINE PhiloxWords philox4x32(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = 0xD2511F53ull * c0, product1 = 0xCD9E8D57ull * c2;
    const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    c0 = next0;
    c2 = next2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Numbers drawn for different purposes never share a counter, so none is ever used twice in a round.
enum class Purpose : uint32_t { draft = 0, accept = 1, close = 2, plain = 3, derive = 4, gumbel = 5 };

// `base` is the absolute index of the round's first token: a position drafted, rejected and drafted again
// belongs to two rounds and gets fresh numbers. Counter word 3 is the lane; its top byte is kept for epochs.
FORETOKEN_INLINE PhiloxWords random_words(uint64_t seed, uint64_t base, Purpose purpose, uint32_t index,
                                          uint32_t lane = 0) {
  return philox4x32(seed, static_cast<uint32_t>(base), static_cast<uint32_t>(base >> 32),
                    static_cast<uint32_t>(purpose) << 24 | (index & 0xFFFFFFu), lane);
}

FORETOKEN_INLINE uint32_t random_coin(uint64_t seed, uint64_t base, uint32_t node) {
  return random_words(seed, base, Purpose::accept, node).word[0];
}

FORETOKEN_INLINE uint64_t random_bits(uint64_t seed, uint64_t base, Purpose purpose, uint32_t index) {
  const PhiloxWords words = random_words(seed, base, purpose, index);
  return static_cast<uint64_t>(words.word[1]) << 32 | words.word[0];
}

// The seed of row `row`, return sequence `sequence` in a batch that was given one integer seed.
FORETOKEN_INLINE uint64_t derive_seed(uint64_t seed, uint32_t row, uint32_t sequence) {
  if (row == 0 && sequence == 0) return seed;
  const PhiloxWords words = philox4x32(seed, row, sequence, static_cast<uint32_t>(Purpose::derive) << 24, 0);
  return static_cast<uint64_t>(words.word[1]) << 32 | words.word[0];
}

}  // namespace foretoken

// Whole rows on the CPU: from a row of logits to its law, and from laws to tokens.
#pragma once

#include <vector>

#include "cpu/row_kernels.hpp"
#include "ops/tile_stats.hpp"

namespace foretoken::cpu {

struct Row {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t size = 0;

  float at(int64_t token) const;
};

constexpr int64_t kMaxTiles = tiles_of(kMaxVocab);

// A tile of a row, padded where the row ends.
class Tile {
 public:
  // As float32: in place where the row already is float32 and the tile is whole.
  const float* of(const RowKernels& kernels, const Row& row, int64_t index, float pad);
  // In place wherever the tile is whole, as float32 where it is not.
  TileRef ref(const RowKernels& kernels, const Row& row, int64_t index, float pad);

 private:
  alignas(64) float buffer_[kTile];
};

// The processing of one request, read from its slot.
struct Processing {
  float temperature = 1.0f;
  int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;
};

Processing processing_of(const SamplingView& sampling, int64_t slot);

// Temperature, top-k (keeps ties), top-p (every token at or above the smallest threshold whose mass reaches
// it), min-p (relative to the largest), in transformers' order. Temperature 0 is the point law of the argmax.
// `tile_masses`, if given: of a law that is usable and no point, how its mass is made up.
// `given`, if it is: statistics of the row's tiles, so that it need not be read; used where nothing filters.
RowLaw law_of_logits(const Row& row, const Processing& processing, uint64_t* tile_masses = nullptr,
                     const TileStats* given = nullptr);

// Probabilities are final; they are normalised by their own sum, which must be within 2 % of 1.
RowLaw law_of_probs(const Row& row);

// Lowest id among the largest elements, NaN ignored; 0 if there is none.
int64_t argmax(const Row& row);

// log of a token's probability under the law; -infinity if it has none.
float log_probability(const Row& row, const RowLaw& law, int64_t token);

// The share of a law's mass that is not on the given tokens. Counted anew rather than subtracted: after a
// token that was all but certain, little is left, and drafts are drawn from that.
double share_without(const Row& row, const RowLaw& law, const std::vector<int64_t>& tokens);

// Entropy of a law, in nats.
double entropy(const Row& row, const RowLaw& law);

// How many elements that the law keeps are larger than that of `token`.
int64_t count_likelier(const Row& row, const RowLaw& law, int64_t token);

// The n likeliest tokens of a law, best first, the lowest id first on ties; ids behind the last possible are
// -1.
void likeliest(const Row& row, const RowLaw& law, int64_t n, int64_t* tokens, float* logprobs);

}  // namespace foretoken::cpu

#include "cpu/gumbel.hpp"

#include <limits>

#include "math/gumbel.hpp"

namespace foretoken::cpu {

int64_t gumbel_draw(const Row& row, const RowLaw& law, uint64_t seed, uint64_t position) {
  if (law.kind == LawKind::point) return law.top;
  const RowKernels& kernels = row_kernels();
  Tile tile;
  int64_t best = -1;
  double best_time = std::numeric_limits<double>::infinity();
  // A token can only win if its uniform lies below weight * best E / best weight, as E is never smaller than
  // its uniform: for nearly all tokens one multiplication decides, and no logarithm is taken.
  double reach = std::numeric_limits<double>::infinity();
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    const float* x = tile.of(kernels, row, index, -std::numeric_limits<float>::infinity());
    for (int e = 0; e < kTile; e += 2) {
      if (!(x[e] >= law.cut || x[e + 1] >= law.cut)) continue;
      const PhiloxWords words = gumbel_words(seed, position, index * kTile + e);
      for (int64_t token = index * kTile + e; token < index * kTile + e + 2; ++token) {
        const float logit = x[token - index * kTile];
        if (!(logit >= law.cut)) continue;
        const double weight = static_cast<double>(weight_of_logit(logit, law.max, law.scale, law.cut));
        const double uniform = race_uniform(gumbel_bits(words, token));
        if (uniform > weight * reach) continue;
        const double log_weight = (static_cast<double>(logit) - static_cast<double>(law.max)) *
                                  static_cast<double>(law.scale) * kLn2;
        const double time = race_time(uniform, log_weight);
        if (time < best_time) {  // strict: on ties the lower id stays
          best = token;
          best_time = time;
          reach = race_exponential(uniform) / weight * 1.00001;  // the weight is only good to 1e-7
        }
      }
    }
  }
  return best;
}

}  // namespace foretoken::cpu

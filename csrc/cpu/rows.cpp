#include "cpu/rows.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/filters.hpp"
#include "cpu/parallel.hpp"

namespace foretoken::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Top {
  int64_t token;  // lowest id among the largest elements, NaN passed over; 0 if there is none
  bool has_nan;
};

Top top_of(const Row& row) {
  const RowKernels& kernels = row_kernels();
  Tile tile;
  float best = -kInfinity;
  int64_t best_tile = -1;
  bool any_nan = false;
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    const auto [high, has_nan] = kernels.max_of(tile.ref(kernels, row, index, -kInfinity));
    any_nan |= has_nan;
    if (high > best) {  // strict: on ties the lower id stays
      best = high;
      best_tile = index;
    }
  }
  if (best_tile < 0) return {0, any_nan};
  const float* x = tile.of(kernels, row, best_tile, -kInfinity);
  return {best_tile * kTile + (std::find(x, x + kTile, best) - x), any_nan};
}

// The same from statistics of the tiles. Where those are of another row, the row is read.
Top top_of(const Row& row, const TileStats* given) {
  const RowKernels& kernels = row_kernels();
  int64_t best_tile = -1;
  bool regular = true;
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    regular &= is_regular(given[index].max, given[index].sum, true);
    if (given[index].max > (best_tile < 0 ? -kInfinity : given[best_tile].max)) best_tile = index;
  }
  if (best_tile < 0 || !regular) return {argmax(row), !regular};
  Tile tile;
  const float* x = tile.of(kernels, row, best_tile, -kInfinity);
  const float* place = std::find(x, x + kTile, given[best_tile].max);
  return place == x + kTile ? top_of(row) : Top{best_tile * kTile + (place - x), false};
}

// What summarise() finds, from statistics of the tiles.
bool take_summary(const TileStats* given, int64_t tiles, RowLaw& law, RowSummary& summary) {
  law.max = -kInfinity;
  bool regular = true;
  for (int64_t index = 0; index < tiles; ++index) {
    const TileStats stats = given[index];
    regular &= is_regular(stats.max, stats.sum, false);
    summary.tiles[index] = {stats.max, stats.sum, true};
    law.max = std::max(law.max, stats.max);
  }
  return regular && law.max > -kInfinity;
}

RowLaw unusable(const Row& row) {
  RowLaw law;
  law.usable = false;
  law.top = argmax(row);
  return law;
}

// Calls body(first tile, count, where its results go) for the whole tiles of a row, one run for each thread,
// then for what is left.
template <class Body>
void for_each_run(const Row& row, float pad, Body body) {
  const int64_t whole = row.size / kTile;
  const int64_t runs = std::min<int64_t>(threads_for(whole, kTile), whole);
  parallel_for(runs, row.size, [&](int64_t run) {
    const int64_t first = whole * run / runs, count = whole * (run + 1) / runs - first;
    Tile tile;
    body(tile.ref(row_kernels(), row, first, pad), count, first);
  });
  if (whole * kTile == row.size) return;
  Tile rest;
  body(rest.ref(row_kernels(), row, whole, pad), int64_t{1}, whole);
}

// Sums of tiles relative to their largest element, of the elements that a filter has kept.
class CutTiles {
 public:
  CutTiles(const Row& row, const RowLaw& law, const RowSummary& summary)
      : kernels_(row_kernels()), row_(row), law_(law), summary_(summary) {}

  float sum(int64_t index) {
    const float anchor = summary_.tiles[index].max;
    const float cut = std::max(law_.cut, logits_floor(anchor, law_.scale));
    const TileRef tile = tile_.ref(kernels_, row_, index, -kInfinity);
    // Most filters leave one or two elements of a tile, whose sum has one order. Where there were more, there
    // will be more in the next tiles too.
    if (dense_ == 0) {
      float least = anchor;
      const int64_t kept = count(index, tile, cut, least);
      if (kept == 1) return 1.0f;
      if (kept == 2) return 1.0f + exp2_scaled(least - anchor, law_.scale);
      dense_ = summary_.kept != nullptr ? 1 : kPatience;
    }
    --dense_;
    return kernels_.sum_weights(tile, anchor, law_.scale, cut);
  }

 private:
  static constexpr int kPatience = 4;

  // Elements at least `cut`, and the least of them.
  int64_t count(int64_t index, TileRef tile, float cut, float& least) {
    const float *begin = buffer_, *end = buffer_;
    if (summary_.kept != nullptr) {
      begin = summary_.kept + summary_.first[index];
      end = summary_.kept + summary_.first[index + 1];
    } else {
      end += kernels_.between(tile, cut, kInfinity, buffer_);
    }
    int64_t kept = 0;
    for (; begin < end && kept < 3; ++begin) {
      if (*begin < cut) continue;
      ++kept;
      least = std::min(least, *begin);
    }
    return kept;
  }

  const RowKernels& kernels_;
  const Row& row_;
  const RowLaw& law_;
  const RowSummary& summary_;
  Tile tile_;
  float buffer_[kTile];
  int dense_ = 0;  // tiles yet to be summed without looking
};

}  // namespace

const float* Tile::of(const RowKernels& kernels, const Row& row, int64_t index, float pad) {
  const int64_t first = index * kTile;
  const int64_t count = std::clamp<int64_t>(row.size - first, 0, kTile);  // 0: a draft row that ends before
  if (row.dtype == DType::float32 && count == kTile) return static_cast<const float*>(row.data) + first;
  kernels.load(row.data, row.dtype, first, count, pad, buffer_);
  return buffer_;
}

TileRef Tile::ref(const RowKernels& kernels, const Row& row, int64_t index, float pad) {
  const int64_t first = index * kTile;
  if (first + kTile > row.size) return {of(kernels, row, index, pad), DType::float32};
  return {static_cast<const char*>(row.data) + first * bytes_of(row.dtype), row.dtype};
}

float Row::at(int64_t token) const {
  if (dtype == DType::float32) return static_cast<const float*>(data)[token];
  const uint32_t bits = static_cast<const uint16_t*>(data)[token];
  return dtype == DType::bfloat16 ? float_of_bfloat(bits) : float_of_half(bits);
}

Processing processing_of(const SamplingView& sampling, int64_t slot) {
  return {sampling.temperature[slot], sampling.top_k[slot], sampling.top_p[slot], sampling.min_p[slot]};
}

RowLaw law_of_logits(const Row& row, const Processing& processing, uint64_t* tile_masses,
                     const TileStats* given) {
  RowLaw law;
  if (processing.temperature == 0.0f) {
    law.kind = LawKind::point;
    const Top top = given != nullptr ? top_of(row, given) : top_of(row);
    law.top = top.token;
    law.usable = !top.has_nan && row.at(top.token) > -kInfinity;
    return law;
  }
  law.kind = LawKind::logits;
  law.scale = logits_scale(processing.temperature);
  RowSummary summary;
  const bool filtered = filters_on(processing, row.size);
  const bool usable = given != nullptr && !filtered ? take_summary(given, tiles_of(row.size), law, summary)
                                                    : summarise(row, law, summary);
  if (!usable) return unusable(row);

  const float floor = logits_floor(law.max, law.scale);
  law.cut = floor;
  // Of two zeros the one without a sign, whichever of them the threshold was found at.
  if (filtered) law.cut = std::max(floor, filter_cut(row, law, processing, summary)) + 0.0f;
  CutTiles tiles(row, law, summary);
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    const float anchor = summary.tiles[index].max;
    uint64_t mass = 0;
    if (anchor >= law.cut) {
      // The first pass summed what the filters have removed since.
      const float sum = law.cut > floor ? tiles.sum(index) : summary.tiles[index].sum;
      mass = mass_of_tile(sum, weight_of_logit(anchor, law.max, law.scale, law.cut));
    }
    law.mass += mass;
    if (tile_masses != nullptr) tile_masses[index] = mass;
  }
  return law;
}

RowLaw law_of_probs(const Row& row) {
  const RowKernels& kernels = row_kernels();
  RowLaw law;
  law.kind = LawKind::probs;
  law.cut = std::numeric_limits<float>::min();
  ProbsTile tiles[kMaxTiles];
  for_each_run(row, 0.0f, [&](TileRef first, int64_t count, int64_t at) {
    kernels.summarise_probs(first, count, law.cut, tiles + at);
  });
  float low = 0.0f;
  bool has_nan = false;
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    law.max = std::max(law.max, tiles[index].max);
    low = std::min(low, tiles[index].min);
    has_nan |= tiles[index].has_nan;
  }
  // Below 2^-24 even a uniform row over the largest vocabulary does not add up to 1.
  if (has_nan || low < 0.0f || !(law.max > 0x1p-24f && law.max < 2.0f)) return unusable(row);
  law.scale = 1.0f / law.max;
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    law.mass += mass_of_tile(tiles[index].sum, law.scale);
  }
  const double total = static_cast<double>(law.mass) / kMassUnit * static_cast<double>(law.max);
  return total > 0.98 && total < 1.02 ? law : unusable(row);
}

bool summarise(const Row& row, RowLaw& law, RowSummary& summary) {
  const RowKernels& kernels = row_kernels();
  for_each_run(row, -kInfinity, [&](TileRef first, int64_t count, int64_t at) {
    kernels.summarise_logits(first, count, law.scale, summary.tiles + at);
  });
  law.max = -kInfinity;
  bool regular = true;
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    regular &= summary.tiles[index].regular;
    law.max = std::max(law.max, summary.tiles[index].max);
  }
  return regular && law.max > -kInfinity;
}

int64_t argmax(const Row& row) { return top_of(row).token; }

float log_probability(const Row& row, const RowLaw& law, int64_t token) {
  if (law.kind == LawKind::point) return token == law.top ? 0.0f : -kInfinity;
  const float element = row.at(token);
  if (!(element >= law.cut)) return -kInfinity;
  // Not the log of a weight: the exponent is known exactly, so nothing is lost far below the top.
  const double exponent =
      (static_cast<double>(element) - static_cast<double>(law.max)) * static_cast<double>(law.scale) * kLn2;
  return static_cast<float>(exponent - log_positive(static_cast<double>(law.mass) / kMassUnit));
}

double share_without(const Row& row, const RowLaw& law, const std::vector<int64_t>& tokens) {
  const bool probs = law.kind == LawKind::probs;
  const float nothing = probs ? 0.0f : -kInfinity;
  const RowKernels& kernels = row_kernels();
  alignas(64) float x[kTile];
  const TileRef tile{x, DType::float32};
  const auto read = [&](int64_t index) {
    const int64_t first = index * kTile;
    kernels.load(row.data, row.dtype, first, std::min<int64_t>(kTile, row.size - first), nothing, x);
    for (int64_t token : tokens) {
      if (token / kTile == index) x[token % kTile] = nothing;
    }
    return kernels.max_of(tile).max;
  };
  const int64_t tiles = tiles_of(row.size);
  std::vector<float> tile_max(static_cast<size_t>(tiles));
  for (int64_t index = 0; index < tiles; ++index) tile_max[static_cast<size_t>(index)] = read(index);
  const float max = *std::max_element(tile_max.begin(), tile_max.end());
  if (!(max >= law.cut)) return 0.0;
  uint64_t mass = 0;  // in units of the likeliest token that is left
  for (int64_t index = 0; index < tiles; ++index) {
    const float anchor = tile_max[static_cast<size_t>(index)];
    if (anchor < law.cut) continue;
    read(index);
    if (probs) {
      ProbsTile found;
      kernels.summarise_probs(tile, 1, law.cut, &found);
      mass += mass_of_tile(found.sum, 1.0f / max);
    } else {
      const float cut = std::max(law.cut, logits_floor(anchor, law.scale));
      mass += mass_of_tile(kernels.sum_weights(tile, anchor, law.scale, cut),
                           weight_of_logit(anchor, max, law.scale, law.cut));
    }
  }
  return static_cast<double>(mass) * static_cast<double>(weight_in(law, max)) / static_cast<double>(law.mass);
}

double entropy(const Row& row, const RowLaw& law) {
  if (law.kind == LawKind::point) return 0.0;
  // Sum of weight * log2(1 / weight) in whole mass units: the same in any order.
  const RowKernels& kernels = row_kernels();
  Tile tile;
  uint64_t sum = 0;
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    const float* x = tile.of(kernels, row, index, -kInfinity);
    for (int e = 0; e < kTile; ++e) {
      if (x[e] < law.cut) continue;
      const float weight = weight_of_logit(x[e], law.max, law.scale, law.cut);
      sum += mass_of(weight * ((law.max - x[e]) * law.scale));
    }
  }
  const double mass = static_cast<double>(law.mass);
  return log_positive(mass / kMassUnit) + kLn2 * (static_cast<double>(sum) / mass);
}

int64_t count_likelier(const Row& row, const RowLaw& law, int64_t token) {
  const float bound = row.at(token);
  if (law.kind == LawKind::point) return token == law.top ? 0 : 1;
  const RowKernels& kernels = row_kernels();
  Tile tile;
  int64_t count = 0;
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    const float* x = tile.of(kernels, row, index, -kInfinity);
    for (int e = 0; e < kTile; ++e) count += x[e] > bound ? 1 : 0;
  }
  return count;
}

void likeliest(const Row& row, const RowLaw& law, int64_t n, int64_t* tokens, float* logprobs) {
  const RowKernels& kernels = row_kernels();
  Tile tile;
  std::vector<std::pair<float, int64_t>> best;  // (negated element, id): ascending is best first
  const size_t wanted = static_cast<size_t>(n);
  for (int64_t index = 0; n > 0 && law.usable && index < tiles_of(row.size); ++index) {
    const float* x = tile.of(kernels, row, index, -kInfinity);
    for (int e = 0; e < kTile; ++e) {
      const int64_t token = index * kTile + e;
      if (law.kind == LawKind::point ? token != law.top : !(x[e] >= law.cut)) continue;
      const std::pair<float, int64_t> entry{-x[e], token};
      if (best.size() == wanted && !(entry < best.back())) continue;
      best.insert(std::upper_bound(best.begin(), best.end(), entry), entry);
      if (best.size() > wanted) best.pop_back();
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const bool there = i < static_cast<int64_t>(best.size());
    tokens[i] = there ? best[static_cast<size_t>(i)].second : -1;
    logprobs[i] = there ? log_probability(row, law, tokens[i]) : -kInfinity;
  }
}

}  // namespace foretoken::cpu

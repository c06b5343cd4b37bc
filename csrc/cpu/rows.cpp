#include "cpu/rows.hpp"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/filters.hpp"
#include "math/half.hpp"

namespace foretoken::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t tiles_of(int64_t size) { return (size + kTile - 1) / kTile; }

// A tile of a row as float32, in place where the row already is float32 and the tile is whole.
struct Tile {
  alignas(64) float buffer[kTile];

  const float* of(const RowKernels& kernels, const Row& row, int64_t index, float pad) {
    const int64_t first = index * kTile, count = std::min<int64_t>(kTile, row.size - first);
    if (row.dtype == DType::float32 && count == kTile) return static_cast<const float*>(row.data) + first;
    kernels.load(row.data, row.dtype, first, count, pad, buffer);
    return buffer;
  }
};

float pad_of(const RowLaw& law) { return law.kind == LawKind::probs ? 0.0f : -kInfinity; }

// The two tiles that a residual reads side by side, and the loop over them.
struct ResidualTiles {
  explicit ResidualTiles(const Residual& r) : residual(r), kernels(row_kernels()) {}

  int64_t count() const { return tiles_of(residual.target.size); }

  double sum(int64_t index) {
    const float* t = target.of(kernels, residual.target, index, -kInfinity);
    const float* d = draft.of(kernels, residual.draft, index, pad_of(*residual.draft_law));
    return kernels.sum_residual(t, *residual.target_law, d, *residual.draft_law, residual.gain);
  }

  uint64_t masses(int64_t index, uint64_t* out) {
    const float* t = target.of(kernels, residual.target, index, -kInfinity);
    const bool dense = residual.draft.data != nullptr;
    const float* d = dense ? draft.of(kernels, residual.draft, index, pad_of(*residual.draft_law)) : nullptr;
    const RowLaw& draft_law = dense ? *residual.draft_law : *residual.target_law;
    uint64_t total = kernels.masses(t, *residual.target_law, d, draft_law, residual.gain, out);
    const int64_t excluded = residual.excluded - index * kTile;
    if (excluded >= 0 && excluded < kTile) {
      total -= out[excluded];
      out[excluded] = 0;
    }
    return total;
  }

  const Residual& residual;
  const RowKernels& kernels;
  Tile target, draft;
};

RowLaw unusable(const Row& row) {
  RowLaw law;
  law.usable = false;
  law.top = argmax(row);
  return law;
}

}  // namespace

float Row::at(int64_t token) const {
  if (dtype == DType::float32) return static_cast<const float*>(data)[token];
  const uint32_t bits = static_cast<const uint16_t*>(data)[token];
  return dtype == DType::bfloat16 ? float_of_bfloat(bits) : float_of_half(bits);
}

Processing processing_of(const SamplingView& sampling, int64_t slot) {
  return {sampling.temperature[slot], sampling.top_k[slot], sampling.top_p[slot], sampling.min_p[slot]};
}

RowLaw law_of_logits(const Row& row, const Processing& processing) {
  const RowKernels& kernels = row_kernels();
  const int64_t tiles = tiles_of(row.size);
  const bool greedy = processing.temperature == 0.0f;
  RowLaw law;
  law.kind = greedy ? LawKind::point : LawKind::logits;
  law.scale = greedy ? 0.0f : logits_scale(processing.temperature);

  RowSummary summary(tiles);
  Tile tile;
  bool has_nan = false;
  for (int64_t index = 0; index < tiles; ++index) {
    const float* x = tile.of(kernels, row, index, -kInfinity);
    const TileExtremes extremes = kernels.extremes(x, summary.group_max(index));
    summary.tile_max[index] = extremes.max;
    has_nan |= extremes.has_nan;
    const bool summed = !greedy && extremes.max > -kInfinity && extremes.max < kInfinity;
    summary.tile_sum[index] =
        summed ? kernels.sum_weights(x, extremes.max, law.scale, logits_floor(extremes.max, law.scale))
               : 0.0f;
  }
  law.max = *std::max_element(summary.tile_max.begin(), summary.tile_max.end());
  if (has_nan || law.max == -kInfinity || (law.max == kInfinity && !greedy)) return unusable(row);
  if (greedy) {
    law.top = argmax(row);
    return law;
  }

  const float floor = logits_floor(law.max, law.scale);
  law.cut = floor;
  if (filters_on(processing, row.size)) law.cut = std::max(floor, filter_cut(row, law, processing, summary));
  for (int64_t index = 0; index < tiles; ++index) {
    const float anchor = summary.tile_max[index];
    if (anchor < law.cut) continue;
    float sum = summary.tile_sum[index];
    if (law.cut > floor) {  // the first pass summed what the filters have removed since
      const float* x = tile.of(kernels, row, index, -kInfinity);
      sum = kernels.sum_weights(x, anchor, law.scale, std::max(law.cut, logits_floor(anchor, law.scale)));
    }
    law.mass += mass_of_tile(sum, weight_of_logit(anchor, law.max, law.scale, law.cut));
  }
  return law;
}

RowLaw law_of_probs(const Row& row) {
  const RowKernels& kernels = row_kernels();
  const int64_t tiles = tiles_of(row.size);
  std::vector<float> sums(static_cast<size_t>(tiles));
  RowLaw law;
  law.kind = LawKind::probs;
  law.cut = 0x1p-126f;
  Tile tile;
  float groups[kGroups];
  float low = 0.0f;
  bool has_nan = false;
  double total = 0.0;
  for (int64_t index = 0; index < tiles; ++index) {
    const float* x = tile.of(kernels, row, index, 0.0f);
    const TileExtremes extremes = kernels.extremes(x, groups);
    law.max = std::max(law.max, extremes.max);
    low = std::min(low, extremes.min);
    has_nan |= extremes.has_nan;
    sums[static_cast<size_t>(index)] = kernels.sum_probs(x, law.cut);
    total += static_cast<double>(sums[static_cast<size_t>(index)]);
  }
  if (has_nan || low < 0.0f || !(total > 0.98 && total < 1.02)) return unusable(row);
  law.scale = 1.0f / law.max;
  for (float sum : sums) law.mass += mass_of_tile(sum, law.scale);
  return law;
}

int64_t argmax(const Row& row) {
  const RowKernels& kernels = row_kernels();
  Tile tile;
  float groups[kGroups];
  float best = -kInfinity;
  int64_t best_tile = -1;
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    const float high = kernels.extremes(tile.of(kernels, row, index, -kInfinity), groups).max;
    if (high > best) {  // strict: on ties the lower id stays
      best = high;
      best_tile = index;
    }
  }
  if (best_tile < 0) return 0;
  const float* x = tile.of(kernels, row, best_tile, -kInfinity);
  return best_tile * kTile + (std::find(x, x + kTile, best) - x);
}

float log_probability(const Row& row, const RowLaw& law, int64_t token) {
  if (law.kind == LawKind::point) return token == law.top ? 0.0f : -kInfinity;
  const float element = row.at(token);
  if (!(element >= law.cut)) return -kInfinity;
  // Not the log of a weight: the exponent is known exactly, so nothing is lost far below the top.
  const double exponent =
      (static_cast<double>(element) - static_cast<double>(law.max)) * static_cast<double>(law.scale) * kLn2;
  return static_cast<float>(exponent - log_positive(static_cast<double>(law.mass) / kMassUnit));
}

double residual_fraction(const Residual& residual) {
  ResidualTiles tiles(residual);
  uint64_t mass = 0;
  for (int64_t index = 0; index < tiles.count(); ++index) {
    mass += mass_of_tile(static_cast<float>(tiles.sum(index)), 1.0f);
  }
  return static_cast<double>(mass) / static_cast<double>(residual.target_law->mass);
}

uint64_t total_mass(const Row& row, const RowLaw& law) {
  Residual residual;
  residual.target = row;
  residual.target_law = &law;
  ResidualTiles tiles(residual);
  uint64_t masses[kTile];
  uint64_t total = 0;
  for (int64_t index = 0; index < tiles.count(); ++index) total += tiles.masses(index, masses);
  return total;
}

int64_t draw(const Residual& residual, uint64_t bits) {
  ResidualTiles tiles(residual);
  uint64_t masses[kTile];
  std::vector<uint64_t> totals(static_cast<size_t>(tiles.count()));
  uint64_t total = 0;
  for (int64_t index = 0; index < tiles.count(); ++index) {
    total += totals[static_cast<size_t>(index)] = tiles.masses(index, masses);
  }
  if (total == 0) return -1;
  uint64_t left = multiply_high(bits, total);  // uniform in [0, total)
  int64_t index = 0;
  while (left >= totals[static_cast<size_t>(index)]) left -= totals[static_cast<size_t>(index++)];
  tiles.masses(index, masses);
  int64_t element = 0;
  while (left >= masses[element]) left -= masses[element++];
  return index * kTile + element;
}

void all_masses(const Residual& residual, uint64_t* out) {
  ResidualTiles tiles(residual);
  uint64_t masses[kTile];
  for (int64_t index = 0; index < tiles.count(); ++index) {
    tiles.masses(index, masses);
    const int64_t first = index * kTile, count = std::min<int64_t>(kTile, residual.target.size - first);
    std::copy(masses, masses + count, out + first);
  }
}

}  // namespace foretoken::cpu

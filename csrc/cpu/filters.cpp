#include "cpu/filters.hpp"

#include <algorithm>
#include <functional>
#include <limits>

namespace foretoken::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float distance_of_weight(double weight, float scale) {
  return static_cast<float>(log_positive(weight) * kLog2E / static_cast<double>(scale));
}

std::vector<float> elements_at_least(const Row& row, float bound, const RowSummary& summary) {
  const RowKernels& kernels = row_kernels();
  std::vector<float> kept;
  size_t count = 0;
  Tile tile;
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    if (summary.tiles[index].max < bound) continue;
    kept.resize(count + kTile);  // the kernel writes whole vectors
    const TileRef x = tile.ref(kernels, row, index, -kInfinity);
    count += static_cast<size_t>(kernels.at_least(x, bound, kept.data() + count));
  }
  kept.resize(count);
  return kept;
}

float kth_largest(std::vector<float>& values, int64_t k) {
  std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<float>());
  return values[static_cast<size_t>(k - 1)];
}

// The k-th largest maximum of disjoint groups cannot exceed the k-th largest element: whole tiles are the
// groups where there are enough of them, 64 elements each otherwise.
float lower_bound_of_kth(const Row& row, const RowSummary& summary, int64_t k) {
  const int64_t tiles = tiles_of(row.size);
  if (k <= tiles) {
    std::vector<float> maxima;
    for (int64_t index = 0; index < tiles; ++index) maxima.push_back(summary.tiles[index].max);
    return kth_largest(maxima, k);
  }
  if (k > tiles * kGroups) return -kInfinity;
  const RowKernels& kernels = row_kernels();
  std::vector<float> maxima(static_cast<size_t>(tiles * kGroups));
  Tile tile;
  for (int64_t index = 0; index < tiles; ++index) {
    kernels.group_max(tile.ref(kernels, row, index, -kInfinity), maxima.data() + index * kGroups);
  }
  return kth_largest(maxima, k);
}

float top_k_cut(const Row& row, const RowSummary& summary, int64_t k) {
  std::vector<float> kept = elements_at_least(row, lower_bound_of_kth(row, summary, k), summary);
  return kth_largest(kept, k);
}

// The integer masses of a list of logits, as if it were a row.
std::vector<uint64_t> masses_of(const std::vector<float>& logits, const RowLaw& law) {
  const RowKernels& kernels = row_kernels();
  const Row row{logits.data(), DType::float32, static_cast<int64_t>(logits.size())};
  std::vector<uint64_t> masses(static_cast<size_t>(tiles_of(row.size) * kTile));
  Tile tile;
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    const TileRef x = tile.ref(kernels, row, index, -kInfinity);
    kernels.masses(x, law, {}, law, 0.0f, masses.data() + index * kTile);
  }
  return masses;
}

// Largest threshold t such that the mass of {logit >= t} reaches `need`, -infinity if all of it does not:
// one pass spreads the candidates over equal bins, and the bin in which `need` is reached is sorted.
// Masses are integers, so the answer depends neither on the order of the candidates nor on the bins.
float threshold_reaching(const std::vector<float>& candidates, const std::vector<uint64_t>& masses, float low,
                         float high, uint64_t need) {
  constexpr int kBins = 1024;
  const float per_unit = high > low ? static_cast<float>(kBins - 1) / (high - low) : 0.0f;
  const auto bin_of = [=](float logit) { return static_cast<int>((high - logit) * per_unit); };
  std::vector<uint64_t> bins(kBins, 0);
  for (size_t i = 0; i < candidates.size(); ++i)
    bins[static_cast<size_t>(bin_of(candidates[i]))] += masses[i];
  int bin = 0;
  while (bin < kBins && bins[static_cast<size_t>(bin)] < need) need -= bins[static_cast<size_t>(bin++)];
  if (bin == kBins) return -kInfinity;
  std::vector<std::pair<float, uint64_t>> inside;
  for (size_t i = 0; i < candidates.size(); ++i) {
    if (bin_of(candidates[i]) == bin) inside.emplace_back(candidates[i], masses[i]);
  }
  std::sort(inside.begin(), inside.end(), std::greater<>());
  size_t last = 0;
  while (inside[last].second < need) need -= inside[last++].second;
  return inside[last].first;
}

float top_p_cut(const Row& row, const RowLaw& law, float top_p, float kept_from, const RowSummary& summary) {
  RowLaw whole = law;
  whole.cut = std::max(logits_floor(law.max, law.scale), kept_from);
  float bound = whole.cut;
  uint64_t total = 0;
  if (kept_from == -kInfinity) {
    for (int64_t index = 0; index < tiles_of(row.size); ++index) {
      const LogitsTile& tile = summary.tiles[index];
      total += mass_of_tile(tile.sum, weight_of_logit(tile.max, law.max, law.scale, whole.cut));
    }
    // All tokens lighter than (1 - top_p) * mass / V together weigh less than what may be left out, so none
    // of them is ever needed. Half of that: the masses of tiles and of elements are rounded differently.
    const double mass = static_cast<double>(total) / kMassUnit;
    const double light = 0.5 * (1.0 - static_cast<double>(top_p)) * mass / static_cast<double>(row.size);
    if (light > 1e-30) bound = std::max(bound, law.max + distance_of_weight(light, law.scale));
  }
  bound = std::min(bound, law.max);
  const std::vector<float> candidates = elements_at_least(row, bound, summary);
  const std::vector<uint64_t> masses = masses_of(candidates, whole);
  if (kept_from != -kInfinity) {
    for (size_t i = 0; i < candidates.size(); ++i) total += masses[i];
  }
  const uint64_t need = static_cast<uint64_t>(static_cast<double>(top_p) * static_cast<double>(total));
  return threshold_reaching(candidates, masses, bound, law.max, std::max<uint64_t>(need, 1));
}

}  // namespace

bool filters_on(const Processing& processing, int64_t vocab) {
  return (processing.top_k > 0 && processing.top_k < vocab) || processing.top_p < 1.0f ||
         processing.min_p > 0.0f;
}

float filter_cut(const Row& row, const RowLaw& law, const Processing& processing, const RowSummary& summary) {
  const bool top_k = processing.top_k > 0 && processing.top_k < row.size;
  const float kept_from = top_k ? top_k_cut(row, summary, processing.top_k) : -kInfinity;
  float cut = kept_from;
  if (processing.top_p < 1.0f) {
    cut = std::max(cut, top_p_cut(row, law, processing.top_p, kept_from, summary));
  }
  if (processing.min_p > 0.0f) {
    cut = std::max(cut, law.max + distance_of_weight(static_cast<double>(processing.min_p), law.scale));
  }
  return cut;
}

}  // namespace foretoken::cpu

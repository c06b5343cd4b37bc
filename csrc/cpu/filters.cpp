#include "cpu/filters.hpp"

#include <algorithm>
#include <functional>
#include <limits>

namespace foretoken::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> elements_at_least(const Row& row, float bound, const RowSummary& summary) {
  const RowKernels& kernels = row_kernels();
  std::vector<float> kept;
  float buffer[kTile];
  for (size_t tile = 0; tile < summary.tile_max.size(); ++tile) {
    if (summary.tile_max[tile] < bound) continue;
    const int64_t first = static_cast<int64_t>(tile) * kTile;
    const int64_t count = std::min<int64_t>(kTile, row.size - first);
    kernels.load(row.data, row.dtype, first, count, -kInfinity, buffer);
    for (int64_t e = 0; e < count; ++e) {
      if (buffer[e] >= bound) kept.push_back(buffer[e]);
    }
  }
  return kept;
}

// The k-th largest maximum of disjoint groups cannot exceed the k-th largest element.
float lower_bound_of_kth(const RowSummary& summary, int64_t k) {
  if (static_cast<int64_t>(summary.groups.size()) < k) return -kInfinity;
  std::vector<float> groups = summary.groups;
  std::nth_element(groups.begin(), groups.begin() + (k - 1), groups.end(), std::greater<float>());
  return groups[static_cast<size_t>(k - 1)];
}

struct Weighed {
  float logit;
  uint64_t mass;
};

// Largest threshold t such that the mass of {logit >= t} reaches `need`: a quickselect on masses. Integers
// make the answer independent of the order of the candidates and of the pivots.
float threshold_reaching(std::vector<Weighed>& candidates, uint64_t need) {
  size_t begin = 0, end = candidates.size();
  float threshold = -kInfinity;
  while (begin < end) {
    const float a = candidates[begin].logit, b = candidates[(begin + end) / 2].logit;
    const float c = candidates[end - 1].logit;
    const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    const auto first = candidates.begin() + static_cast<std::ptrdiff_t>(begin);
    const auto last = candidates.begin() + static_cast<std::ptrdiff_t>(end);
    const auto equal = std::partition(first, last, [=](const Weighed& w) { return w.logit > pivot; });
    const auto below = std::partition(equal, last, [=](const Weighed& w) { return w.logit == pivot; });
    uint64_t above_mass = 0, equal_mass = 0;
    for (auto it = first; it != equal; ++it) above_mass += it->mass;
    for (auto it = equal; it != below; ++it) equal_mass += it->mass;
    if (above_mass >= need) {
      end = static_cast<size_t>(equal - candidates.begin());
      continue;
    }
    threshold = pivot;
    if (above_mass + equal_mass >= need) return threshold;
    need -= above_mass + equal_mass;
    begin = static_cast<size_t>(below - candidates.begin());
  }
  return threshold;
}

uint64_t logit_mass(const RowLaw& law, float logit, float floor) {
  return mass_of(weight_of_logit(logit, law.max, law.scale, floor));
}

float top_p_cut(const Row& row, const RowLaw& law, float top_p, float top_k_cut, const RowSummary& summary) {
  const float floor = std::max(logits_floor(law.max, law.scale), top_k_cut);
  uint64_t total = 0;
  float bound = floor;
  if (top_k_cut == -kInfinity) {
    // Tokens lighter than (1 - top_p) * mass / V weigh less than 1 - top_p together: none is ever needed.
    // Half of that, as this mass and the candidates' masses are rounded differently.
    double mass = 0.0;
    for (size_t tile = 0; tile < summary.tile_max.size(); ++tile) {
      mass += static_cast<double>(summary.tile_sum[tile]) *
              static_cast<double>(weight_of_logit(summary.tile_max[tile], law.max, law.scale, floor));
    }
    const double light = 0.5 * (1.0 - static_cast<double>(top_p)) * mass / static_cast<double>(row.size);
    if (light > 1e-30) {
      const double distance = log_positive(light) * kLog2E / static_cast<double>(law.scale);
      bound = std::max(bound, static_cast<float>(static_cast<double>(law.max) + distance));
    }
    RowLaw whole = law;
    whole.cut = floor;
    total = total_mass(row, whole);
  }
  std::vector<Weighed> candidates;
  for (float logit : elements_at_least(row, bound, summary)) {
    candidates.push_back({logit, logit_mass(law, logit, floor)});
  }
  if (top_k_cut != -kInfinity) {
    for (const Weighed& candidate : candidates) total += candidate.mass;
  }
  const uint64_t need = static_cast<uint64_t>(static_cast<double>(top_p) * static_cast<double>(total));
  return threshold_reaching(candidates, std::max<uint64_t>(need, 1));
}

}  // namespace

bool filters_on(const Processing& processing, int64_t vocab) {
  return (processing.top_k > 0 && processing.top_k < vocab) || processing.top_p < 1.0f ||
         processing.min_p > 0.0f;
}

float filter_cut(const Row& row, const RowLaw& law, const Processing& processing, const RowSummary& summary) {
  float top_k_cut = -kInfinity;
  if (processing.top_k > 0 && processing.top_k < row.size) {
    const int64_t k = processing.top_k;
    std::vector<float> kept = elements_at_least(row, lower_bound_of_kth(summary, k), summary);
    std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end(), std::greater<float>());
    top_k_cut = kept[static_cast<size_t>(k - 1)];
  }
  float cut = top_k_cut;
  if (processing.top_p < 1.0f) cut = std::max(cut, top_p_cut(row, law, processing.top_p, top_k_cut, summary));
  if (processing.min_p > 0.0f) {
    const double distance =
        log_positive(static_cast<double>(processing.min_p)) * kLog2E / static_cast<double>(law.scale);
    cut = std::max(cut, static_cast<float>(static_cast<double>(law.max) + distance));
  }
  return cut;
}

}  // namespace foretoken::cpu

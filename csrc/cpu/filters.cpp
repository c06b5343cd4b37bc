#include "cpu/filters.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

namespace foretoken::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

float distance_of_weight(double weight, float scale) {
  return static_cast<float>(log_positive(weight) * kLog2E / static_cast<double>(scale));
}

// A growing list of logits, to be read in whole tiles: behind the last there is -infinity.
class Logits {
 public:
  int64_t size() const { return size_; }
  int64_t tiles() const { return tiles_of(size_); }
  TileRef tile(int64_t index) const { return {elements_.get() + index * kTile, DType::float32}; }
  const float* begin() const { return elements_.get(); }

  void clear() { size_ = 0; }

  // Appends what of a tile lies in [low, high); pad() has to follow the last one.
  void append(TileRef tile, float low, float high) {
    make_room(kTile);
    size_ += row_kernels().between(tile, low, high, elements_.get() + size_);
  }
  void append(const float* logits, int64_t count) {
    make_room(count);
    std::copy(logits, logits + count, elements_.get() + size_);
    size_ += count;
  }
  void pad() {
    make_room(0);
    std::fill(elements_.get() + size_, elements_.get() + tiles() * kTile, -kInfinity);
  }

  void assign(const Logits& from, float low, float high) {
    clear();
    for (int64_t index = 0; index < from.tiles(); ++index) append(from.tile(index), low, high);
    pad();
  }

 private:
  void make_room(int64_t more) {
    const int64_t needed = size_ + more + kTile;  // a tile of padding
    if (needed <= capacity_) return;
    capacity_ = std::max(needed, 2 * capacity_);
    std::unique_ptr<float[]> larger(new float[static_cast<size_t>(capacity_)]);
    std::copy(elements_.get(), elements_.get() + size_, larger.get());
    elements_ = std::move(larger);
  }

  std::unique_ptr<float[]> elements_;
  int64_t size_ = 0, capacity_ = 0;
};

// Kept from row to row: a list may be as long as the row, and the pages of a fresh one cost more than all
// else.
struct Scratch {
  Logits kept, candidates, part;
  std::vector<uint64_t> measures;
  std::vector<std::pair<float, uint64_t>> sorted;

  static Scratch& of_thread() {
    thread_local Scratch scratch;
    return scratch;
  }
};

// What a list is measured in: tokens, or integer masses of a law. Both are whole numbers, so neither the
// order of the elements nor where a list is cut changes a measure.
struct Count {
  uint64_t of(const Logits& list) const { return static_cast<uint64_t>(list.size()); }
  void one_by_one(const Logits& list, std::vector<uint64_t>& out) const {
    out.assign(static_cast<size_t>(list.size()), 1);
  }
};

struct Mass {
  RowLaw law;
  uint64_t of(const Logits& list) const {
    uint64_t sum = 0;
    for (int64_t index = 0; index < list.tiles(); ++index) {
      sum += row_kernels().sum_masses(list.tile(index), law, {}, law, 0.0f);
    }
    return sum;
  }
  void one_by_one(const Logits& list, std::vector<uint64_t>& out) const {
    out.resize(static_cast<size_t>(list.tiles() * kTile));
    for (int64_t index = 0; index < list.tiles(); ++index) {
      row_kernels().masses(list.tile(index), law, {}, law, 0.0f, out.data() + index * kTile);
    }
  }
};

template <class Measure>
float reached_in_order(const Logits& list, uint64_t need, const Measure& measure, Scratch& scratch) {
  auto& measures = scratch.measures;
  auto& sorted = scratch.sorted;
  measure.one_by_one(list, measures);
  sorted.clear();
  for (int64_t i = 0; i < list.size(); ++i) {
    sorted.emplace_back(list.begin()[i], measures[static_cast<size_t>(i)]);
  }
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  size_t last = 0;
  while (sorted[last].second < need) need -= sorted[last++].second;
  return sorted[last].first;
}

// Largest element t of a list such that {element >= t} measures at least `need`, -infinity if all of it does
// not. The elements lie in [low, high]; the interval is halved until it holds few of them.
template <class Measure>
float largest_reaching(Logits& list, float low, float high, uint64_t need, const Measure& measure,
                       Scratch& scratch) {
  constexpr int64_t kFew = 64;
  if (measure.of(list) < need) return -kInfinity;
  Logits& part = scratch.part;
  while (list.size() > kFew) {
    const float middle = low + (high - low) * 0.5f;
    if (!(middle > low && middle < high)) break;
    part.assign(list, middle, kInfinity);
    const uint64_t above = measure.of(part);
    if (above >= need) {
      low = middle;
    } else {
      need -= above;
      high = middle;
      part.assign(list, low, middle);
    }
    const bool stuck = part.size() == list.size();
    std::swap(list, part);
    if (stuck) {  // ties, as half-precision logits have them
      float most = -kInfinity;
      for (int64_t index = 0; index < list.tiles(); ++index) {
        most = std::max(most, row_kernels().max_of(list.tile(index)).max);
      }
      part.assign(list, most, kInfinity);
      if (part.size() == list.size()) return most;
    }
  }
  return reached_in_order(list, need, measure, scratch);
}

void append_of_row(const Row& row, const RowSummary& summary, float low, float high, Logits& out) {
  const RowKernels& kernels = row_kernels();
  Tile tile;
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    if (summary.tiles[index].max >= low) out.append(tile.ref(kernels, row, index, -kInfinity), low, high);
  }
  out.pad();
}

// The k-th largest maximum of disjoint groups cannot exceed the k-th largest element: whole tiles are the
// groups where there are enough of them, 64 elements each otherwise.
float lower_bound_of_kth(const Row& row, float floor, float max, const RowSummary& summary, int64_t k,
                         Scratch& scratch) {
  const RowKernels& kernels = row_kernels();
  const int64_t tiles = tiles_of(row.size);
  if (k > tiles * kGroups) return floor;
  Logits &all = scratch.kept, &maxima = scratch.candidates;
  all.clear();
  Tile tile;
  for (int64_t index = 0; index < tiles; ++index) {
    float groups[kGroups];
    if (k > tiles) {
      kernels.group_max(tile.ref(kernels, row, index, -kInfinity), groups);
      all.append(groups, kGroups);
    } else {
      all.append(&summary.tiles[index].max, 1);
    }
  }
  all.pad();
  maxima.assign(all, floor, kInfinity);
  return std::max(floor, largest_reaching(maxima, floor, max, static_cast<uint64_t>(k), Count{}, scratch));
}

// The k-th largest element; leaves in scratch.kept all from some element below it on. What lies below the
// floor has no weight anyway: then the lowest number, or -infinity if the row does not even have k elements.
float top_k_cut(const Row& row, float floor, float max, const RowSummary& summary, int64_t k,
                Scratch& scratch) {
  const float bound = lower_bound_of_kth(row, floor, max, summary, k, scratch);
  Logits &kept = scratch.kept, &candidates = scratch.candidates;
  kept.clear();
  append_of_row(row, summary, bound, kInfinity, kept);
  candidates.clear();
  if (kept.size() < k) {
    append_of_row(row, summary, kLowest, kInfinity, candidates);
    return candidates.size() < k ? -kInfinity : kLowest;
  }
  candidates.assign(kept, bound, kInfinity);
  return largest_reaching(candidates, bound, max, static_cast<uint64_t>(k), Count{}, scratch);
}

// Of a whole row, whose mass is that of its tiles.
float top_p_cut(const Row& row, const RowLaw& whole, float top_p, const RowSummary& summary,
                Scratch& scratch) {
  uint64_t total = 0;
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    const LogitsTile& tile = summary.tiles[index];
    total += mass_of_tile(tile.sum, weight_of_logit(tile.max, whole.max, whole.scale, whole.cut));
  }
  uint64_t need =
      std::max<uint64_t>(static_cast<uint64_t>(static_cast<double>(top_p) * static_cast<double>(total)), 1);
  // All tokens lighter than (1 - top_p) * mass / V together weigh less than what may be left out, so none of
  // them is ever needed. Half of that: the masses of tiles and of elements are rounded differently.
  const double mass = static_cast<double>(total) / kMassUnit;
  const double light = 0.5 * (1.0 - static_cast<double>(top_p)) * mass / static_cast<double>(row.size);
  float bound = whole.cut;
  if (light > 1e-30) bound = std::max(bound, whole.max + distance_of_weight(light, whole.scale));
  bound = std::min(bound, whole.max);

  // From the top down, a slice of some nats at a time: the heavy tokens are few, and the row is in the cache.
  float step = distance_of_weight(0x1p3, whole.scale), low = whole.max, high = kInfinity;
  Logits& slice = scratch.candidates;
  for (int slices = 1;; ++slices) {
    low = std::max(bound, low - step);
    slice.clear();
    append_of_row(row, summary, low, high, slice);
    const uint64_t in_slice = Mass{whole}.of(slice);
    if (in_slice >= need) {
      return largest_reaching(slice, low, std::min(high, whole.max), need, Mass{whole}, scratch);
    }
    if (low <= bound) return -kInfinity;
    need -= in_slice;
    high = low;
    if (slices > 6) step *= 2.0f;
  }
}

// Of what top-k has left.
float top_p_cut(const RowLaw& whole, float top_p, Scratch& scratch) {
  Logits& candidates = scratch.candidates;
  candidates.assign(scratch.kept, std::min(whole.cut, whole.max), kInfinity);
  const uint64_t total = Mass{whole}.of(candidates);
  const uint64_t need = static_cast<uint64_t>(static_cast<double>(top_p) * static_cast<double>(total));
  return largest_reaching(candidates, whole.cut, whole.max, std::max<uint64_t>(need, 1), Mass{whole},
                          scratch);
}

}  // namespace

bool filters_on(const Processing& processing, int64_t vocab) {
  return (processing.top_k > 0 && processing.top_k < vocab) || processing.top_p < 1.0f ||
         processing.min_p > 0.0f;
}

float filter_cut(const Row& row, const RowLaw& law, const Processing& processing, const RowSummary& summary) {
  const float floor = logits_floor(law.max, law.scale);
  float cut = -kInfinity;
  Scratch& scratch = Scratch::of_thread();
  if (processing.top_k > 0 && processing.top_k < row.size) {
    cut = top_k_cut(row, floor, law.max, summary, processing.top_k, scratch);
  }
  if (processing.top_p < 1.0f) {
    RowLaw whole = law;
    whole.cut = std::max(floor, cut);
    cut = std::max(cut, cut == -kInfinity ? top_p_cut(row, whole, processing.top_p, summary, scratch)
                                          : top_p_cut(whole, processing.top_p, scratch));
  }
  if (processing.min_p > 0.0f) {
    cut = std::max(cut, law.max + distance_of_weight(static_cast<double>(processing.min_p), law.scale));
  }
  return cut;
}

}  // namespace foretoken::cpu

#include "cpu/filters.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <utility>

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
  float* begin() { return elements_.get(); }
  float* end() { return elements_.get() + size_; }

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

  void truncate(int64_t size) {
    size_ = size;
    pad();
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
  bool sorted = false;  // candidates: all of kept, largest first

  static Scratch& of_thread() {
    thread_local Scratch scratch;
    scratch.sorted = false;
    return scratch;
  }
};

float largest_of(const Logits& list) {
  float most = -kInfinity;
  for (int64_t index = 0; index < list.tiles(); ++index) {
    most = std::max(most, row_kernels().max_of(list.tile(index)).max);
  }
  return most;
}

// What a list is measured in: tokens, or integer masses of a law. Both are whole numbers, so neither the
// order of the elements nor where a list is cut changes a measure.
struct Count {
  uint64_t of(const Logits& list) const { return static_cast<uint64_t>(list.size()); }
  uint64_t of(float) const { return 1; }
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
  uint64_t of(float logit) const { return mass_of(weight_of_logit(logit, law.max, law.scale, law.cut)); }
};

constexpr int64_t kFew = 96;  // few enough to be sorted

// Largest first: each goes where the number of larger ones says, so there is no branch to be guessed wrong.
void sort_few(Logits& list) {
  float sorted[kFew];
  int32_t place[kFew] = {};
  const float* x = list.begin();
  for (int64_t i = 0; i < list.size(); ++i) {
    int32_t before = 0;
    for (int64_t j = 0; j < i; ++j) place[j] += x[i] > x[j] ? 1 : 0;
    for (int64_t j = 0; j < i; ++j) before += x[i] > x[j] ? 0 : 1;
    place[i] = before;
  }
  for (int64_t i = 0; i < list.size(); ++i) sorted[place[i]] = x[i];
  std::copy(sorted, sorted + list.size(), list.begin());
}

// The same of a list that is sorted, and reaches it.
template <class Measure>
float reached_in_order(const float* largest, uint64_t need, const Measure& measure) {
  for (uint64_t one; (one = measure.of(*largest)) < need; ++largest) need -= one;
  return *largest;
}

// Largest element t of a list such that {element >= t} measures at least `need`, -infinity if all of it does
// not. The elements lie in [low, high]; the interval is halved until it holds few of them.
template <class Measure>
float largest_reaching(Logits& list, float low, float high, uint64_t need, const Measure& measure,
                       Logits& part) {
  if (measure.of(list) < need) return -kInfinity;
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
      const float most = largest_of(list);
      part.assign(list, most, kInfinity);
      if (part.size() == list.size()) return most;
    }
  }
  if (list.size() <= kFew) {
    sort_few(list);
  } else {  // all within the last place of the largest
    std::sort(list.begin(), list.end(), std::greater<>());
  }
  return reached_in_order(list.begin(), need, measure);
}

// `first`, if given: where the elements of each tile begin.
void append_of_row(const Row& row, const RowSummary& summary, float low, float high, Logits& out,
                   int32_t* first = nullptr) {
  const RowKernels& kernels = row_kernels();
  Tile tile;
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    if (first != nullptr) first[index] = static_cast<int32_t>(out.size());
    if (summary.tiles[index].max >= low) out.append(tile.ref(kernels, row, index, -kInfinity), low, high);
  }
  if (first != nullptr) first[tiles_of(row.size)] = static_cast<int32_t>(out.size());
  out.pad();
}

// A number, at least the floor, that k elements reach if there are so many above the floor, and not many more
// do: k of the maxima of disjoint groups reach it. Whole tiles are the groups where there are enough of them,
// 64 elements each otherwise.
float lower_bound_of_kth(const Row& row, const RowLaw& law, float floor, const RowSummary& summary, int64_t k,
                         Scratch& scratch) {
  constexpr int kSteps = 14;
  const RowKernels& kernels = row_kernels();
  const int64_t tiles = tiles_of(row.size);
  if (k > tiles * kGroups) return floor;
  Logits &all = scratch.kept, &above = scratch.part;
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
  float low = floor, high = law.max;
  const float near = law.max - distance_of_weight(0x1p20, law.scale);  // most often it is within so many nats
  for (int step = 0; step < kSteps; ++step) {
    const float middle = step == 0 && near > floor ? near : low + (high - low) * 0.5f;
    above.assign(all, middle, kInfinity);
    if (above.size() < k) {
      high = middle;
    } else {
      low = middle;
      std::swap(all, above);
      if (all.size() <= k + k / 4) break;
    }
  }
  return low;
}

// The k-th largest element; leaves all from some element below it on in scratch.kept, tile by tile in
// `summary`. What lies below the floor has no weight anyway: then the lowest number, or -infinity if the row
// does not even have k elements.
float top_k_cut(const Row& row, const RowLaw& law, float floor, RowSummary& summary, int64_t k,
                Scratch& scratch) {
  const float bound = lower_bound_of_kth(row, law, floor, summary, k, scratch);
  Logits &kept = scratch.kept, &candidates = scratch.candidates;
  kept.clear();
  append_of_row(row, summary, bound, kInfinity, kept, summary.first);
  summary.kept = kept.begin();
  if (kept.size() < k) {
    candidates.clear();
    append_of_row(row, summary, kLowest, kInfinity, candidates);
    return candidates.size() < k ? -kInfinity : kLowest;
  }
  candidates.assign(kept, bound, kInfinity);
  if (candidates.size() > kFew) {
    return largest_reaching(candidates, bound, law.max, static_cast<uint64_t>(k), Count{}, scratch.part);
  }
  sort_few(candidates);
  scratch.sorted = true;
  return candidates.begin()[k - 1];
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
      return largest_reaching(slice, low, std::min(high, whole.max), need, Mass{whole}, scratch.part);
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
  const float bound = std::min(whole.cut, whole.max);
  if (scratch.sorted) {
    const float* end = std::upper_bound(candidates.begin(), candidates.end(), bound, std::greater<>());
    candidates.truncate(end - candidates.begin());
  } else {
    candidates.assign(scratch.kept, bound, kInfinity);
  }
  const uint64_t total = Mass{whole}.of(candidates);
  const uint64_t wanted = static_cast<uint64_t>(static_cast<double>(top_p) * static_cast<double>(total));
  const uint64_t need = std::max<uint64_t>(wanted, 1);
  if (scratch.sorted && total >= need) return reached_in_order(candidates.begin(), need, Mass{whole});
  return largest_reaching(candidates, whole.cut, whole.max, need, Mass{whole}, scratch.part);
}

}  // namespace

bool filters_on(const Processing& processing, int64_t vocab) {
  return (processing.top_k > 0 && processing.top_k < vocab) || processing.top_p < 1.0f ||
         processing.min_p > 0.0f;
}

float filter_cut(const Row& row, const RowLaw& law, const Processing& processing, RowSummary& summary) {
  const float floor = logits_floor(law.max, law.scale);
  float cut = -kInfinity;
  Scratch& scratch = Scratch::of_thread();
  if (processing.top_k > 0 && processing.top_k < row.size) {
    cut = top_k_cut(row, law, floor, summary, processing.top_k, scratch);
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

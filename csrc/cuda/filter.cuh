// Thresholds of top-k, top-p and min-p without sorting or renormalising; numbers as in cpu/filters.cpp. One
// block finds the threshold of a row from the few elements that matter, where the largest elements of the
// lanes (32 apart) say which those are, or from a sample, see cuda/window_filter.cuh; a cluster does it for
// rows where too many matter, see cuda/cluster_filter.cuh. All count in integers, so neither order nor route
// changes a threshold.
#pragma once

#include "cuda/window_filter.cuh"

namespace foretoken::cuda {

// Threshold of one row by one block.
class BlockFilter {
 public:
  __device__ BlockFilter(const RowTask& task, FilterScratch& scratch) : task_(task), scratch_(scratch) {}

  // Sets law.cut (the law is the row's without filters) and counts the tiles anew; false: left to a cluster.
  __device__ __noinline__ bool run(const Filters& filters, RowLaw& law) {
    return list(filters, law) || (takes_window(filters) && WindowFilter(task_, scratch_).run(filters, law));
  }

  // Whether a threshold among too many elements to be listed can be looked for in a window.
  __device__ bool takes_window(const Filters& filters) const {
    return filters.top_p < 1.0f && !filters.cuts_count(task_.row.size);
  }

  // The same for a row of which few elements matter; false: too many do, and nothing is changed.
  __device__ __forceinline__ bool list(const Filters& filters, RowLaw& law) {
    const int64_t tiles = tiles_of(task_.row.size);
    const float floor = task_.reading.floor_below(law.max);
    max_ = law.max;
    fine_ = law.scale * static_cast<float>(kBinsPerBit);
    const float least_kept = filters.min_p > 0.0f
                                 ? law.max + distance_of_weight(static_cast<double>(filters.min_p), law.scale)
                                 : -infinity();
    if (task_.lanes == nullptr || !choose_limit(filters, law, least_kept, tiles)) return false;
    const float wanted = takes_window(filters) ? static_cast<float>(static_cast<double>(filters.top_p) *
                                                                    static_cast<double>(law.mass) / kMassUnit)
                                               : 0.0f;
    if (!gather(tiles, wanted)) return false;
    float cut = -infinity();
    if (filters.cuts_count(task_.row.size)) {
      cut = reach(static_cast<uint64_t>(filters.top_k), [](uint32_t, uint64_t) { return uint64_t{1}; });
      if (!(cut > floor)) return false;
    }
    if (filters.top_p < 1.0f && !cut_mass(filters, law, floor, cut)) return false;
    cut = fmaxf(cut, least_kept);
    law.cut = fmaxf(floor, cut) + 0.0f;  // as in cpu/rows.cpp: no negative zero
    if (law.cut > floor) count_anew(law, tiles);
    return true;
  }

 private:
  static constexpr int kBinsPerBit = 8;
  static constexpr int kWeightless = 125 * kBinsPerBit - 8;
  static constexpr uint64_t kGroupsAtOnce = 256;

  // Smaller for larger elements, and never the other way round.
  __device__ int bin_of(float x) const {
    return static_cast<int>(fminf((max_ - x) * fine_, static_cast<float>(kBins - 1)));
  }

  // body(i, largest element of lane i), eight of them on their way at a time.
  template <class Body>
  __device__ __forceinline__ void for_lanes(int64_t tiles, Body body) const {
    constexpr int kAtOnce = 8;
#pragma unroll 1
    for (int64_t first = threadIdx.x; first < tiles * kWarpSize; first += kAtOnce * kThreads) {
      float high[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64_t i = first + j * kThreads;
        high[j] = i < tiles * kWarpSize ? task_.lanes[i] : -infinity();
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64_t i = first + j * kThreads;
        if (i < tiles * kWarpSize) body(i, high[j]);
      }
    }
  }

  // Elements in bins up to limit_ are looked at. Of disjoint groups of elements the k largest maxima are k
  // elements, so the k-th largest element is not below the k-th largest maximum.
  __device__ bool choose_limit(const Filters& filters, const RowLaw&, float least_kept, int64_t tiles) {
    if (!filters.cuts_count(task_.row.size) && filters.top_p >= 1.0f) {
      limit_ = bin_of(least_kept);
      return limit_ < kWeightless;
    }
    const uint64_t need =
        filters.cuts_count(task_.row.size) ? static_cast<uint64_t>(filters.top_k) : kGroupsAtOnce;
    if (need > kLaneGroups) return false;
    clear_bins(scratch_);
    block_sync();
    for_lanes(tiles,
              [&](int64_t, float high) { count_in_bin(scratch_, static_cast<uint32_t>(bin_of(high))); });
    block_sync();
    uint64_t before = 0;
    limit_ = bin_reaching(scratch_, need, before);
    if (limit_ < 0) limit_ = kBins;  // fewer groups than asked for
    if (!filters.cuts_count(task_.row.size)) limit_ = limit_ > kWeightless ? kWeightless - 1 : limit_ - 1;
    return limit_ >= 0 && limit_ < kWeightless;
  }

  // Lists the elements in question; false if they are too many, or will hardly weigh as much as is wanted.
  __device__ bool gather(int64_t tiles, float wanted) {
    constexpr float kPart = 0x1p-16f, kBesideLargest = 2.0f;
    if (threadIdx.x == 0) scratch_.listed = scratch_.grouped = scratch_.weighs = 0;
    block_sync();
    uint32_t weighs = 0;
    for_lanes(tiles, [&](int64_t i, float high) {
      if (bin_of(high) > limit_) return;
      weighs += static_cast<uint32_t>(exp2f((high - max_) * fine_ / kBinsPerBit) / kPart);
      const int place = atomicAdd(&scratch_.grouped, 1);
      if (place < kLaneGroups) scratch_.groups[place] = static_cast<uint32_t>(i);
    });
    weighs = __reduce_add_sync(kAllLanes, weighs);
    if (lane_id() == 0 && weighs > 0) atomicAdd(&scratch_.weighs, weighs);
    block_sync();
    const int grouped = scratch_.grouped;
    const float found = static_cast<float>(scratch_.weighs) * kPart;
    if (grouped > kLaneGroups || kBesideLargest * found < wanted) return false;
    for (int item = threadIdx.x; item < 4 * grouped; item += kThreads) {
      const uint32_t group = scratch_.groups[item / 4];
      const int64_t first =
          static_cast<int64_t>(group / kWarpSize) * kTile + item % 4 * 256 + group % kWarpSize * 8;
      float x[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[j] = first + j < task_.row.size ? element_at(task_.row, first + j) : -infinity();
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (bin_of(x[j]) > limit_) continue;
        const int place = atomicAdd(&scratch_.listed, 1);
        if (place >= kList) continue;
        scratch_.keys[place] = key_of(x[j]);
        scratch_.ids[place] = static_cast<int32_t>(first + j);
      }
    }
    block_sync();
    return scratch_.listed <= kList;
  }

  // Largest listed element t such that {element >= t} measures at least `need`; -infinity if all of them do
  // not. `measure(key, mass)`.
  template <class Measure>
  __device__ float reach(uint64_t need, Measure measure) {
    const int listed = scratch_.listed;
    if (listed <= kCounted) return reach_by_counting(need, measure);
    return search_keys(scratch_, {key_of(-infinity()), key_of(max_)}, need, [&](auto count) {
      for (int i = threadIdx.x; i < listed; i += kThreads) {
        count(scratch_.keys[i], measure(scratch_.keys[i], scratch_.masses[i]));
      }
    });
  }

  static constexpr int kLookers = 4;  // threads that share the counting for one element
  static constexpr int kCounted = kThreads / kLookers;

  template <class Measure>
  __device__ float reach_by_counting(uint64_t need, Measure measure) {
    const int listed = scratch_.listed, i = threadIdx.x / kLookers;
    if (threadIdx.x == 0) scratch_.found[0] = key_of(-infinity());
    block_sync();
    const uint32_t key = i < listed ? scratch_.keys[i] : 0;
    uint64_t above = 0, level = 0;
    for (int j = threadIdx.x % kLookers; j < listed; j += kLookers) {
      const uint32_t other = scratch_.keys[j];
      const uint64_t amount = measure(other, scratch_.masses[j]);
      above += other > key ? amount : 0;
      level += other == key ? amount : 0;
    }
#pragma unroll
    for (int step = 1; step < kLookers; step *= 2) {
      above += __shfl_xor_sync(kAllLanes, above, step);
      level += __shfl_xor_sync(kAllLanes, level, step);
    }
    // Equal keys write the same.
    if (i < listed && above < need && need <= above + level) scratch_.found[0] = key;
    block_sync();
    const float found = value_of(static_cast<uint32_t>(scratch_.found[0]));
    block_sync();
    return found;
  }

  __device__ bool cut_mass(const Filters& filters, const RowLaw& law, float floor, float& cut) {
    RowLaw whole = law;
    whole.cut = fmaxf(floor, cut);
    uint64_t listed_mass = 0;
    for (int i = threadIdx.x; i < scratch_.listed; i += kThreads) {
      const float x = value_of(scratch_.keys[i]);
      const uint64_t mass = mass_of(weight_of_logit(x, whole.max, whole.scale, whole.cut));
      scratch_.masses[i] = mass;
      listed_mass += mass;
    }
    listed_mass = sum_of_block(scratch_, listed_mass);
    const uint64_t need = needed_mass(filters.top_p, cut == -infinity() ? law.mass : listed_mass);
    if (cut == -infinity() && listed_mass < need) return false;
    cut = fmaxf(cut, reach(need, [](uint32_t, uint64_t mass) { return mass; }));
    return true;
  }

  // The sums of the first pass contain what the filters have removed since. One or two elements have one sum
  // in any order; tiles with more are summed in theirs.
  __device__ void count_anew(const RowLaw& law, int64_t tiles) {
    for (int64_t index = threadIdx.x; index < tiles; index += kThreads) {
      scratch_.kept[index] = 0;
      scratch_.least[index] = ~0u;
    }
    if (threadIdx.x == 0) scratch_.grouped = 0;
    block_sync();
    for (int i = threadIdx.x; i < scratch_.listed; i += kThreads) {
      const uint32_t key = scratch_.keys[i];
      if (value_of(key) < law.cut) continue;
      atomicAdd(&scratch_.kept[scratch_.ids[i] / kTile], 1u);
      atomicMin(&scratch_.least[scratch_.ids[i] / kTile], key);
    }
    block_sync();
    for (int64_t index = threadIdx.x; index < tiles; index += kThreads) {
      const uint32_t kept = scratch_.kept[index];
      if (kept == 0) continue;
      if (kept > 2) {
        scratch_.ids[atomicAdd(&scratch_.grouped, 1)] = static_cast<int32_t>(index);  // the list is done with
        continue;
      }
      const float anchor = read_stats(task_.stats + index).max;
      const float least = value_of(scratch_.least[index]);
      task_.stats[index].sum = kept == 1 ? 1.0f : 1.0f + exp2_scaled(least - anchor, law.scale);
    }
    block_sync();
    for (int i = threadIdx.x / kWarpSize; i < scratch_.grouped; i += kWarps) {
      recount_tile(task_, law, scratch_.ids[i]);
    }
    block_sync();
  }

  const RowTask& task_;
  FilterScratch& scratch_;
  float max_ = 0.0f, fine_ = 0.0f;
  int limit_ = 0;
};

}  // namespace foretoken::cuda

// Top-p for rows in which the threshold lies among thousands of elements: a sample of the row says about
// where, one pass adds up exactly what lies above that and lists what lies near, and the list has the answer.
// What the sample suggests is checked in whole numbers, so it decides how long the search takes, never how it
// ends.
#pragma once

#include <cstddef>

#include "cuda/filter_scratch.cuh"

namespace foretoken::cuda {

// One row by one block. Every member is called by all of its threads.
class WindowFilter {
 public:
  // Keys of elements near the threshold, where the list of those that matter is otherwise.
  static constexpr int kWindow = 4 * kList;
  static __device__ uint32_t* list(FilterScratch& scratch) {
    return reinterpret_cast<uint32_t*>(scratch.masses);
  }

  __device__ WindowFilter(const RowTask& task, FilterScratch& scratch)
      : task_(task), scratch_(scratch), tiles_(tiles_of(task.row.size)) {}

  // Elements in [low, high) are listed; nothing is known of the threshold if that is empty.
  struct Window {
    float low = 0.0f, high = 0.0f;
  };

  // Sets law.cut (the law is the row's without filters, law.cut the floor) and counts the tiles anew; false:
  // the sample was misleading, or too many elements lie near the threshold.
  __device__ __noinline__ bool run(const Filters& filters, RowLaw& law) {
    const Window window = guess(filters, law);
    if (!(window.low < window.high)) return false;
    const uint64_t above = look_through(law, window);
    if (!settle(filters, law, window, above)) return false;
    count_anew(law);
    return true;
  }

  // Of what follows, look_through() and count_anew() can be shared with other blocks.
  __device__ __forceinline__ Window guess(const Filters& filters, const RowLaw& law) {
    block_sync();
    const uint64_t need = needed_mass(filters.top_p, law.mass);
    return guess(law, static_cast<double>(law.mass - need) / kMassUnit);
  }

  // Sets law.cut, what lies above the window and the list being known; false: it is not in the window.
  __device__ __forceinline__ bool settle(const Filters& filters, RowLaw& law, const Window& window,
                                         uint64_t above) {
    const uint64_t need = needed_mass(filters.top_p, law.mass);
    const int32_t listed = scratch_.listed;
    block_sync();
    if (listed > kWindow || above >= need) return false;
    float cut = pick(law, window, need - above);
    if (!(cut > -infinity())) return false;
    if (filters.min_p > 0.0f) {
      cut = fmaxf(cut, law.max + distance_of_weight(static_cast<double>(filters.min_p), law.scale));
    }
    law.cut = fmaxf(law.cut, cut) + 0.0f;  // as in cpu/rows.cpp: no negative zero
    return true;
  }

 private:
  static constexpr int kSamples = 8192, kHeld = kSamples / kThreads;
  static constexpr int kBinsPerBit = 32;
  static constexpr int kRoom = kMaxTiles / kWarps;  // of a warp
  static_assert(kRoom >= 2 * kWarpSize, "what a lane each adds fits behind less than a lane each");

  static_assert(offsetof(FilterScratch, groups) - offsetof(FilterScratch, masses) == 4 * kWindow);

  __device__ float weight(const RowLaw& law, float x) const {
    return weight_of_logit(x, law.max, law.scale, law.cut);
  }

  // The sum over the threads up to and with this one: what it is before and behind it. Each thread begins
  // with the very number that the one before it ends with.
  struct Running {
    float before, behind;
  };
  __device__ Running run_up(float own, float* words) const {
    float up_to = own;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const float other = __shfl_up_sync(kAllLanes, up_to, step);
      if (lane_id() >= step) up_to += other;
    }
    if (lane_id() == kWarpSize - 1) words[threadIdx.x / kWarpSize] = up_to;
    float before = __shfl_up_sync(kAllLanes, up_to, 1);
    if (lane_id() == 0) before = 0.0f;
    block_sync();
    float warps_before = 0.0f;
    for (unsigned warp = 0; warp < threadIdx.x / kWarpSize; ++warp) warps_before += words[warp];
    return {before + warps_before, up_to + warps_before};
  }

  // Where the elements below weigh about `rest`, in weights of the row. A sample of them is counted in bins
  // of a thirty-second of a bit; the last one has all that weigh next to nothing. The window is as wide as
  // the sample is uncertain of what lies below, by the squares of the weights.
  __device__ Window guess(const RowLaw& law, double rest) {
    constexpr float kDoubt = 2.2f, kLeast = 0.01f, kMost = 0.3f;
    constexpr int kEach = kBins / kThreads;
    const int64_t size = task_.row.size;
    const float fine = law.scale * static_cast<float>(kBinsPerBit);
    clear_bins(scratch_);
    float* const words = reinterpret_cast<float*>(scratch_.warp_words);
    float* const spread = reinterpret_cast<float*>(scratch_.found);
    if (threadIdx.x == 0) {
      scratch_.listed = scratch_.grouped = 0;
      *spread = kMost;
    }
    block_sync();
    float x[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      // Eight neighbours together, which are one access.
      const int64_t sample = threadIdx.x + static_cast<int64_t>(i) * kThreads;
      const int64_t at = sample / 8 * size / (kSamples / 8) + sample % 8;
      x[i] = element_at(task_.row, at < size ? at : size - 1);
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      count_in_bin(scratch_, static_cast<uint32_t>(fminf((law.max - x[i]) * fine, kBins - 1.0f)));
    }
    block_sync();
    // From the lightest bin on: the first thread has the last bins.
    const int first = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
    const float share = static_cast<float>(size) / kSamples;
    float below[kEach], own = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float one = share * exp2f(-(static_cast<float>(first - i) + 0.5f) / kBinsPerBit);
      const float count = static_cast<float>(scratch_.parts[first - i]);
      own += count * one;
      squares += count * one * one;
      below[i] = own;
    }
    const Running weighs = run_up(own, words);
    const Running squared = run_up(squares, words + kWarps);
    const float wanted = static_cast<float>(rest);
    if (weighs.before < wanted && weighs.behind >= wanted) *spread = sqrtf(squared.behind) / wanted;
    block_sync();
    const float doubt = fminf(fmaxf(kDoubt * *spread, kLeast), kMost);
    const float less = wanted * (1.0f - doubt), more = wanted * (1.0f + doubt);
    float at = weighs.before;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float next = i + 1 < kEach ? weighs.before + below[i] : weighs.behind;
      if (at < less && next >= less) scratch_.listed = first - i + 1;
      if (at < more && next >= more) scratch_.grouped = first - i;
      at = next;
    }
    block_sync();
    const int low = scratch_.listed, high = scratch_.grouped;
    block_sync();
    const float lowest = low < kBins ? law.max - static_cast<float>(low) / fine : law.cut;
    return {fmaxf(law.cut, lowest), law.max - static_cast<float>(high) / fine};
  }

  // Lists what lies in the window; returns the mass of what lies above.
  __device__ uint64_t look_through(const RowLaw& law, const Window& window) {
    if (threadIdx.x == 0) scratch_.listed = 0;
    block_sync();
    uint64_t above = 0;
#pragma unroll 1
    for (int64_t index = threadIdx.x / kWarpSize; index < tiles_; index += kWarps) {
      if (read_stats(task_.stats + index).max < window.low) continue;
      above += reads_whole(task_.row, index) ? look_through_tile<true>(law, window, index)
                                             : look_through_tile<false>(law, window, index);
    }
    return sum_of_block(scratch_, above);
  }

  // What lies above is few in a tile: it is put side by side first, so that lanes do not weigh what does not
  // count.
  template <bool kWhole>
  __device__ __forceinline__ uint64_t look_through_tile(const RowLaw& law, const Window& window,
                                                        int64_t index) {
    TileReader<kWhole> tile(task_.row, index, false);
    uint32_t* const room = scratch_.kept + threadIdx.x / kWarpSize * kRoom;
    const uint32_t lanes_before = (1u << lane_id()) - 1;
    LaneMass mass;
    int count = 0;
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
      const Eight eight = tile.next();
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float x = eight.x[j];
        const uint32_t above = __ballot_sync(kAllLanes, x >= window.high);
        if (x >= window.high) room[count + __popc(above & lanes_before)] = __float_as_uint(x);
        count += __popc(above);
        if (count >= kWarpSize) {
          count -= kWarpSize;
          __syncwarp();
          mass.add(weight(law, __uint_as_float(room[count + lane_id()])));
          __syncwarp();
        }
        if (x >= window.low && x < window.high) {
          const int place = atomicAdd(&scratch_.listed, 1);
          if (place < kWindow) list(scratch_)[place] = key_of(x);
        }
      }
    }
    __syncwarp();
    if (lane_id() < count) mass.add(weight(law, __uint_as_float(room[lane_id()])));
    __syncwarp();
    return mass.total();
  }

  // Largest listed element t such that the listed ones >= t have `need`; -infinity if all of them do not.
  __device__ float pick(const RowLaw& law, const Window& window, uint64_t need) {
    const int listed = scratch_.listed;
    clear_bins(scratch_);
    block_sync();
    const KeyRange range{key_of(window.low), key_of(window.high)};
    return search_keys(scratch_, range, need, [&](auto count) {
      for (int i = threadIdx.x; i < listed; i += kThreads) {
        const uint32_t key = list(scratch_)[i];
        count(key, mass_of(weight(law, value_of(key))));
      }
    });
  }

  // The sums of the first pass contain what the filters have removed since.
  __device__ void count_anew(const RowLaw& law) {
    block_sync();
#pragma unroll 1
    for (int64_t index = threadIdx.x / kWarpSize; index < tiles_; index += kWarps) {
      recount_tile(task_, law, index);
    }
    block_sync();
  }

  const RowTask& task_;
  FilterScratch& scratch_;
  const int64_t tiles_;
};

}  // namespace foretoken::cuda

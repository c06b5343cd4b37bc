// Top-p for rows in which the threshold lies among thousands of elements: a sample of the row says about
// where, one pass adds up exactly what lies above that and lists what lies near, and the list has the answer.
// What the sample suggests is checked in whole numbers, so it decides how long the search takes, never how it
// ends.
#pragma once

#include "cuda/filter_scratch.cuh"

namespace foretoken::cuda {

// One row by one block. Every member is called by all of its threads.
class WindowFilter {
 public:
  __device__ WindowFilter(const RowTask& task, FilterScratch& scratch)
      : task_(task), scratch_(scratch), tiles_(tiles_of(task.row.size)) {}

  // Sets law.cut (law.max and law.scale are known, law.cut is the floor) and counts the tiles anew; false:
  // the sample was misleading, or too many elements lie near the threshold.
  __device__ __noinline__ bool run(const Filters& filters, RowLaw& law) {
    __syncthreads();
    const uint64_t total = mass_of_row(task_.stats, tiles_, law);
    const uint64_t need = needed_mass(filters.top_p, total);
    const Window window = guess(law, static_cast<double>(total - need) / kMassUnit);
    if (!(window.low < window.high)) return false;
    const uint64_t above = look_through(law, window);
    const int32_t listed = scratch_.listed;
    __syncthreads();
    if (listed > kWindow || above >= need) return false;
    float cut = pick(law, window, need - above);
    if (!(cut > -infinity())) return false;
    if (filters.min_p > 0.0f) {
      cut = fmaxf(cut, law.max + distance_of_weight(static_cast<double>(filters.min_p), law.scale));
    }
    const float floor = law.cut;
    law.cut = fmaxf(floor, cut);
    if (law.cut > floor) count_anew(law);
    return true;
  }

 private:
  static constexpr int kSamples = 4096, kHeld = kSamples / kThreads;
  static constexpr int kWindow = kParts * kBins;  // the bins are idle meanwhile
  static constexpr int kSteps = 15;

  struct Window {
    float low, high;  // elements in [low, high) are listed
  };

  __device__ float weight(const RowLaw& law, float x) const {
    return weight_of_logit(x, law.max, law.scale, law.cut);
  }

  // The sum over the block, the same in all threads.
  __device__ float sum_of_floats(float mine) {
    mine = sum_of_warp(mine);
    float* const words = reinterpret_cast<float*>(scratch_.warp_words);
    __syncthreads();
    if (lane_id() == 0) words[threadIdx.x / kWarpSize] = mine;
    __syncthreads();
    return sum_of_warp(lane_id() < kWarps ? words[lane_id()] : 0.0f);
  }

  // Where the elements below weigh about `rest`, in weights of the row.
  __device__ Window guess(const RowLaw& law, double rest) {
    constexpr float kLess = 0.92f, kMore = 1.08f;  // of it; some three times the sample's own error
    const int64_t size = task_.row.size;
    float x[kHeld], weights[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t sample = threadIdx.x + static_cast<int64_t>(i) * kThreads;
      x[i] = element_at(task_.row, sample * size / kSamples);
    }
    const float share = static_cast<float>(size) / kSamples;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) weights[i] = share * weight(law, x[i]);
    const float wanted = static_cast<float>(rest);
    Window below{law.cut, law.cut},
        above{law.max, law.max};  // what is known to be left and right of the ends
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      const Window middle{below.low + (above.low - below.low) * 0.5f,
                          below.high + (above.high - below.high) * 0.5f};
      float of_low = 0.0f, of_high = 0.0f;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        of_low += x[i] < middle.low ? weights[i] : 0.0f;
        of_high += x[i] < middle.high ? weights[i] : 0.0f;
      }
      (sum_of_floats(of_low) < kLess * wanted ? below : above).low = middle.low;
      (sum_of_floats(of_high) < kMore * wanted ? below : above).high = middle.high;
    }
    return {below.low, above.high};
  }

  // Lists what lies in the window; returns the mass of what lies above.
  __device__ uint64_t look_through(const RowLaw& law, const Window& window) {
    if (threadIdx.x == 0) scratch_.listed = 0;
    __syncthreads();
    uint64_t above = 0;
#pragma unroll 1
    for (int64_t index = threadIdx.x / kWarpSize; index < tiles_; index += kWarps) {
      if (read_stats(task_.stats + index).max < window.low) continue;
      above += reads_whole(task_.row, index) ? look_through_tile<true>(law, window, index)
                                             : look_through_tile<false>(law, window, index);
    }
    return sum_of_block(scratch_, above);
  }

  template <bool kWhole>
  __device__ __forceinline__ uint64_t look_through_tile(const RowLaw& law, const Window& window,
                                                        int64_t index) {
    TileReader<kWhole> tile(task_.row, index, false);
    LaneMass mass;
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
      const Eight eight = tile.next();
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float x = eight.x[j];
        mass.add(x >= window.high ? weight(law, x) : 0.0f);
        if (x >= window.low && x < window.high) {
          const int place = atomicAdd(&scratch_.listed, 1);
          if (place < kWindow) scratch_.parts[place] = key_of(x);
        }
      }
    }
    return mass.total();
  }

  // Largest listed element t such that the listed ones >= t have `need`; -infinity if all of them do not.
  __device__ float pick(const RowLaw& law, const Window& window, uint64_t need) {
    constexpr int kEach = kWindow / kThreads;
    const int listed = scratch_.listed;
    uint32_t keys[kEach];
    uint64_t masses[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int place = static_cast<int>(threadIdx.x) + i * kThreads;
      keys[i] = place < listed ? scratch_.parts[place] : 0;
      masses[i] = place < listed ? mass_of(weight(law, value_of(keys[i]))) : 0;
    }
    const auto reaches = [&](uint32_t key) {
      uint64_t mine = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) mine += keys[i] >= key ? masses[i] : 0;
      return sum_of_block(scratch_, mine) >= need;
    };
    uint32_t low = key_of(window.low), high = key_of(window.high);  // reaches(low), not reaches(high)
    if (!reaches(low)) return -infinity();
#pragma unroll 1
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      (reaches(middle) ? low : high) = middle;
    }
    return value_of(low);
  }

  // The sums of the first pass contain what the filters have removed since.
  __device__ void count_anew(const RowLaw& law) {
    __syncthreads();
#pragma unroll 1
    for (int64_t index = threadIdx.x / kWarpSize; index < tiles_; index += kWarps) {
      recount_tile(task_, law, index);
    }
    __syncthreads();
  }

  const RowTask& task_;
  FilterScratch& scratch_;
  const int64_t tiles_;
};

}  // namespace foretoken::cuda

// What the searches for a filter's threshold share: what is asked for, bins, and their memory.
#pragma once

#include "cuda/cluster.cuh"
#include "cuda/law.cuh"
#include "cuda/mass.cuh"

namespace foretoken::cuda {

struct Filters {
  float temperature = 1.0f;
  int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;

  __device__ bool cuts_count(int64_t size) const { return top_k > 0 && top_k < size; }
  __device__ bool any(int64_t size) const { return cuts_count(size) || top_p < 1.0f || min_p > 0.0f; }
};

constexpr int kBins = 1024;
constexpr int kList = 1024;
constexpr int kLaneGroups = 512;

constexpr int kParts = 4, kPartBits = 11;  // of a mass: 2^20 parts of it fit 32 bits

// Shared memory of a block.
struct FilterScratch {
  union {
    uint64_t bins[kMaxTiles];        // masses of tiles, for draws
    uint32_t parts[kParts * kBins];  // what is in each bin, part by part
  };
  uint64_t masses[kList];
  uint32_t keys[kList];          // of the listed elements
  int32_t ids[kList];            // their places in the row
  uint32_t groups[kLaneGroups];  // (tile, lane) whose elements are looked at
  uint32_t kept[kMaxTiles];      // listed elements of a tile that stay ...
  uint32_t least[kMaxTiles];     // ... and the key of the smallest of them
  int32_t listed, grouped;
  uint32_t weighs;  // what the largest of each group weigh together
  uint64_t warp_words[kWarps];
  uint64_t found[2];
  uint64_t answer[2];  // what block 0 of the cluster tells everyone
  uint64_t part[kMaxCluster];
};

__device__ inline float distance_of_weight(double weight, float scale) {
  return static_cast<float>(log_positive(weight) * kLog2E / static_cast<double>(scale));
}

__device__ inline uint64_t needed_mass(float top_p, uint64_t total) {
  const uint64_t need = static_cast<uint64_t>(static_cast<double>(top_p) * static_cast<double>(total));
  return need > 0 ? need : 1;
}

// Shared memory adds 32 bits in one go, 64 by trying until nobody else was faster.
__device__ __forceinline__ void add_to_bin(FilterScratch& scratch, uint32_t bin, uint64_t amount) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const uint64_t rest = amount >> (kPartBits * part);
    const uint32_t piece = static_cast<uint32_t>(part + 1 < kParts ? rest & ((1u << kPartBits) - 1) : rest);
    if (piece != 0) atomicAdd(&scratch.parts[part * kBins + bin], piece);
  }
}

// The same for one piece of it.
__device__ __forceinline__ void count_in_bin(FilterScratch& scratch, uint32_t bin) {
  atomicAdd(&scratch.parts[bin], 1u);
}

__device__ inline void clear_bins(FilterScratch& scratch) {
  for (int i = threadIdx.x; i < kParts * kBins; i += kThreads) scratch.parts[i] = 0;
}

// First bin at which the running sum reaches `need`, and the sum before it; -1 if none. By the whole block,
// behind a barrier; leaves the bins empty.
__device__ inline int bin_reaching(FilterScratch& scratch, uint64_t need, uint64_t& before) {
  constexpr int kEach = kBins / kThreads;
  uint64_t own[kEach], mine = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    own[i] = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      own[i] += static_cast<uint64_t>(scratch.parts[part * kBins + threadIdx.x * kEach + i])
                << (kPartBits * part);
    }
    mine += own[i];
  }
  uint64_t up_to = sum_up_to_lane(mine);
  if (lane_id() == kWarpSize - 1) scratch.warp_words[threadIdx.x / kWarpSize] = up_to;
  if (threadIdx.x == 0) scratch.found[0] = ~uint64_t{0};
  block_sync();
  clear_bins(scratch);
  for (unsigned warp = 0; warp < threadIdx.x / kWarpSize; ++warp) up_to += scratch.warp_words[warp];
  uint64_t at = up_to - mine;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (at < need && need <= at + own[i]) {
      scratch.found[0] = static_cast<uint64_t>(threadIdx.x * kEach + i);
      scratch.found[1] = at;
    }
    at += own[i];
  }
  block_sync();
  before = scratch.found[1];
  return static_cast<int>(static_cast<int64_t>(scratch.found[0]));
}

__device__ inline uint64_t sum_of_block(FilterScratch& scratch, uint64_t mine) {
  mine = sum_of_masses(mine);
  if (lane_id() == 0) scratch.warp_words[threadIdx.x / kWarpSize] = mine;
  block_sync();
  const uint64_t sum = sum_of_masses(lane_id() < kWarps ? scratch.warp_words[lane_id()] : 0);
  block_sync();
  return sum;
}

// The sum of the first pass contains what a filter has removed since. By a warp.
__device__ inline void recount_tile(const RowTask& task, const RowLaw& law, int64_t index) {
  const float anchor = read_stats(task.stats + index).max;
  if (anchor < law.cut) return;
  const float cut = fmaxf(law.cut, task.reading.floor_below(anchor));
  const float sum = sum_of_weights_at(task.row, index, anchor, law.scale, cut);
  if (lane_id() == 0) task.stats[index].sum = sum;
}

// Bins of equal width in key space, of 2^shift keys each, from the top down.
struct KeyRange {
  uint32_t bottom, top;

  __device__ int shift() const {
    const uint32_t span = top - bottom;
    return span < kBins ? 0 : 22 - __clz(static_cast<int>(span));
  }
  __device__ bool holds(uint32_t key) const { return key >= bottom && key <= top; }
  __device__ void narrow(int shift, uint32_t bin) {
    top -= bin << shift;
    const uint32_t last = top - ((1u << shift) - 1);
    bottom = last > bottom && last <= top ? last : bottom;
  }
};

// The largest key in `range` such that what is counted at it or above reaches `need`, as a number; -infinity
// if nothing does. `count_all(count)` calls count(key, amount) for all there is, by the whole block, whose
// bins are empty.
template <class CountAll>
__device__ __forceinline__ float search_keys(FilterScratch& scratch, KeyRange range, uint64_t need,
                                             const CountAll& count_all) {
  while (true) {
    const int shift = range.shift();
    count_all([&](uint32_t key, uint64_t amount) {
      if (range.holds(key)) add_to_bin(scratch, (range.top - key) >> shift, amount);
    });
    block_sync();
    uint64_t before = 0;
    const int bin = bin_reaching(scratch, need, before);
    if (bin < 0) return -infinity();
    need -= before;
    range.narrow(shift, static_cast<uint32_t>(bin));
    if (shift == 0) return value_of(range.top);
  }
}

}  // namespace foretoken::cuda

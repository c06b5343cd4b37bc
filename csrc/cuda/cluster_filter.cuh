// Thresholds of rows in which too many elements matter to be listed: by histograms over the row, in whole
// numbers.
#pragma once

#include "cuda/filter.cuh"

namespace foretoken::cuda {

// Threshold of one row by all blocks of a cluster. Every member is called by all threads of the cluster.
class ClusterFilter {
 public:
  __device__ ClusterFilter(const RowTask& task, FilterScratch& scratch)
      : task_(task),
        scratch_(scratch),
        rank_(cluster_rank()),
        size_(cluster_size()),
        tiles_(tiles_of(task.row.size)) {
    clear_bins(scratch_);
    if (threadIdx.x == 0) scratch_.listed = 0;
    cluster_sync();
  }

  // Sets law.cut (law.max and law.scale are known) and counts the tiles anew.
  __device__ __noinline__ void run(const Filters& filters, RowLaw& law) {
    const float floor = task_.reading.floor_below(law.max);
    float cut = -infinity();
    if (filters.cuts_count(task_.row.size)) {
      cut = reaching(-infinity(), law.max, static_cast<uint64_t>(filters.top_k), Measure::ones());
    }
    law.cut = floor;
    if (filters.top_p < 1.0f) cut = fmaxf(cut, top_p_cut(law, filters.top_p, cut, floor));
    if (filters.min_p > 0.0f) {
      cut = fmaxf(cut, law.max + distance_of_weight(static_cast<double>(filters.min_p), law.scale));
    }
    law.cut = fmaxf(floor, cut) + 0.0f;  // as in cpu/rows.cpp: no negative zero
    if (law.cut > floor) count_anew(law);
    cluster_sync();
  }

 private:
  // What an element adds to a sum: one, or its mass. By value, and not a type for each: every copy of what
  // follows is compiled for each kernel and device.
  struct Measure {
    bool counts;
    float max, scale, cut;

    static __device__ Measure ones() { return {true, 0.0f, 0.0f, 0.0f}; }
    static __device__ Measure masses(const RowLaw& law) { return {false, law.max, law.scale, law.cut}; }
    __device__ __forceinline__ uint64_t of(float x) const {
      return counts ? 1 : mass_of(weight_of_logit(x, max, scale, cut));
    }
  };

  // body(key, element) for the elements of this block in a range.
  template <class Body>
  __device__ void for_elements(const KeyRange& range, Body body) {
    for_own_tiles(tiles_, [&](int64_t index) {
      if (key_of(read_stats(task_.stats + index).max) < range.bottom) return;
      if (reads_whole(task_.row, index)) {
        for_elements_of_tile<true>(range, index, body);
      } else {
        for_elements_of_tile<false>(range, index, body);
      }
    });
  }

  template <bool kWhole, class Body>
  __device__ __forceinline__ void for_elements_of_tile(const KeyRange& range, int64_t index, Body body) {
    TileReader<kWhole> tile(task_.row, index, false);
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
      Eight x = tile.next();
      if constexpr (kWhole) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t key = key_of(x.x[j]);
          if (range.holds(key)) body(key, x.x[j]);
        }
      } else {
        const int64_t left = task_.row.size - (index * kTile + quarter * 256 + lane_id() * 8);
#pragma unroll 1
        for (int j = 0; j < 8 && j < left; ++j) {
          const float at = x.x[0];
#pragma unroll
          for (int i = 0; i < 7; ++i) x.x[i] = x.x[i + 1];
          const uint32_t key = key_of(at);
          if (range.holds(key)) body(key, at);
        }
      }
    }
  }

  // Two words from block 0 to everyone.
  __device__ void tell(uint64_t first, uint64_t second) {
    block_sync();
    if (rank_ == 0 && threadIdx.x < size_) {
      uint64_t* place = of_block(scratch_.answer, threadIdx.x);
      place[0] = first;
      place[1] = second;
    }
    cluster_sync();
  }

  __device__ uint64_t total(uint64_t mine) {
    const uint64_t of_block_ = sum_of_block(scratch_, mine);
    if (threadIdx.x < size_) of_block(scratch_.part, threadIdx.x)[rank_] = of_block_;
    cluster_sync();
    uint64_t sum = 0;
    for (uint32_t rank = 0; rank < size_; ++rank) sum += scratch_.part[rank];
    return sum;
  }

  __device__ float top_p_cut(const RowLaw& law, float top_p, float kept_from, float floor) {
    RowLaw whole = law;
    whole.cut = fmaxf(floor, kept_from);
    float bound = fminf(whole.cut, law.max);
    uint64_t mass = 0;
    if (kept_from == -infinity()) {
      mass = mass_of_row(task_.stats, tiles_, whole);
      // What can never be needed, see cpu/filters.cpp.
      const double light = 0.5 * (1.0 - static_cast<double>(top_p)) *
                           (static_cast<double>(mass) / kMassUnit) / static_cast<double>(task_.row.size);
      if (light > 1e-30) bound = fmaxf(bound, law.max + distance_of_weight(light, law.scale));
      bound = fminf(bound, law.max);
    } else {
      uint64_t mine = 0;
      const Measure masses = Measure::masses(whole);
      for_elements({key_of(bound), key_of(law.max)}, [&](uint32_t, float x) { mine += masses.of(x); });
      mass = total(mine);
    }
    return reaching(bound, law.max, needed_mass(top_p, mass), Measure::masses(whole));
  }

  // Largest threshold t >= low such that the elements >= t together have `need`; -infinity if all do not. The
  // elements in question are spread over bins; those of the bin that holds the answer are listed in block 0,
  // which finishes alone, or spread anew where they are too many.
  __device__ __noinline__ float reaching(float low, float high, uint64_t need, Measure measure) {
    KeyRange range{key_of(low), key_of(high)};
    while (true) {
      const int shift = range.shift();
      count_elements(range, shift, measure);
      uint64_t before = 0;
      const int bin = rank_ == 0 ? bin_reaching(scratch_, need, before) : 0;
      tell(static_cast<uint64_t>(static_cast<int64_t>(bin)), before);
      if (static_cast<int64_t>(scratch_.answer[0]) < 0) return -infinity();
      need -= scratch_.answer[1];
      range.narrow(shift, static_cast<uint32_t>(scratch_.answer[0]));
      if (shift == 0) return value_of(range.top);
      list_elements(range);
      const bool overflow = rank_ == 0 && scratch_.listed > kList;
      const uint64_t found = rank_ == 0 && !overflow ? finish(range, need, measure) : 0;
      block_sync();
      if (threadIdx.x == 0) scratch_.listed = 0;
      tell(found, overflow ? 1 : 0);
      if (scratch_.answer[1] == 0) return value_of(static_cast<uint32_t>(scratch_.answer[0]));
    }
  }

  // Bins of block 0: what all elements in the range measure. Bins are empty before, everywhere; behind it
  // they are so again in all blocks but the first.
  __device__ void count_elements(const KeyRange& range, int shift, const Measure& measure) {
    for_elements(range, [&](uint32_t key, float x) {
      const uint64_t amount = measure.of(x);
      if (amount > 0) add_to_bin(scratch_, (range.top - key) >> shift, amount);
    });
    if (rank_ != 0) {
      block_sync();
      uint32_t* first = of_block(scratch_.parts, 0);
      for (int i = threadIdx.x; i < kParts * kBins; i += kThreads) {
        if (scratch_.parts[i] > 0) atomicAdd(&first[i], scratch_.parts[i]);
        scratch_.parts[i] = 0;
      }
    }
    cluster_sync();
  }

  __device__ void list_elements(const KeyRange& range) {
    int32_t* listed = of_block(&scratch_.listed, 0);
    uint32_t* keys = of_block(scratch_.keys, 0);
    for_elements(range, [&](uint32_t key, float) {
      const int32_t place = atomicAdd(listed, 1);
      if (place < kList) keys[place] = key;
    });
    cluster_sync();
  }

  // The key of the threshold among the listed ones, by block 0; that of -infinity if there is none.
  __device__ uint64_t finish(KeyRange range, uint64_t need, const Measure& measure) {
    const int32_t listed = scratch_.listed;
    while (true) {
      const int shift = range.shift();
      for (int i = threadIdx.x; i < listed; i += kThreads) {
        const uint32_t key = scratch_.keys[i];
        if (range.holds(key)) add_to_bin(scratch_, (range.top - key) >> shift, measure.of(value_of(key)));
      }
      block_sync();
      uint64_t before = 0;
      const int bin = bin_reaching(scratch_, need, before);
      if (bin < 0) return key_of(-infinity());
      need -= before;
      range.narrow(shift, static_cast<uint32_t>(bin));
      if (shift == 0) return range.top;
    }
  }

  // The sums of the first pass contain what the filters have removed since.
  __device__ void count_anew(const RowLaw& law) {
    for_own_tiles(tiles_, [&](int64_t index) { recount_tile(task_, law, index); });
  }

  const RowTask& task_;
  FilterScratch& scratch_;
  const uint32_t rank_, size_;
  const int64_t tiles_;
};

}  // namespace foretoken::cuda

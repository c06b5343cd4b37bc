// Threshold of one row by one warp, bit by bit of the answer: slow, for rows whose filters nobody expected.
#pragma once

#include "cuda/filter_scratch.cuh"

namespace foretoken::cuda {

class WarpFilter {
 public:
  __device__ explicit WarpFilter(const RowTask& task) : task_(task), tiles_(tiles_of(task.row.size)) {}

  // Sets law.cut and law.mass (all else is known) and counts the tiles anew; see ClusterFilter.
  __device__ void run(const Filters& filters, RowLaw& law) const {
    const float floor = task_.reading.floor_below(law.max);
    float cut = -infinity();
    if (filters.cuts_count(task_.row.size)) {
      cut = reaching(-infinity(), law.max, static_cast<uint64_t>(filters.top_k),
                     [](float) { return uint64_t{1}; });
    }
    law.cut = fmaxf(floor, cut);
    if (filters.top_p < 1.0f) {
      const RowLaw whole = law;
      const auto mass_in = [&](float x) {
        return mass_of(weight_of_logit(x, whole.max, whole.scale, whole.cut));
      };
      const uint64_t mass = cut == -infinity() ? law.mass : total(key_of(whole.cut), mass_in);
      cut =
          fmaxf(cut, reaching(fminf(whole.cut, law.max), law.max, needed_mass(filters.top_p, mass), mass_in));
    }
    if (filters.min_p > 0.0f) {
      cut = fmaxf(cut, law.max + distance_of_weight(static_cast<double>(filters.min_p), law.scale));
    }
    law.cut = fmaxf(floor, cut);
    if (!(law.cut > floor)) return;
#pragma unroll 1
    for (int64_t index = 0; index < tiles_; ++index) recount_tile(task_, law, index);
    __syncwarp();
    law.mass = mass_of_row(task_.stats, tiles_, law);
  }

 private:
  // Of the elements whose keys are at least `bottom`.
  template <class Measure>
  __device__ uint64_t total(uint32_t bottom, Measure measure) const {
    uint64_t mine = 0;
#pragma unroll 1
    for (int64_t index = 0; index < tiles_; ++index) {
      if (key_of(read_stats(task_.stats + index).max) < bottom) continue;
      TileReader<false> tile(task_.row, index, false);
#pragma unroll 1
      for (int quarter = 0; quarter < 4; ++quarter) {
        const Eight x = tile.next();
#pragma unroll
        for (int j = 0; j < 8; ++j) mine += key_of(x.x[j]) >= bottom ? measure(x.x[j]) : 0;
      }
    }
    return sum_of_warp(mine);
  }

  // Largest threshold >= low such that the elements from there on have `need`; -infinity if all do not.
  template <class Measure>
  __device__ float reaching(float low, float high, uint64_t need, Measure measure) const {
    uint32_t bottom = key_of(low), top = key_of(high);
    if (total(bottom, measure) < need) return -infinity();
#pragma unroll 1
    while (bottom < top) {
      const uint32_t middle = top - (top - bottom) / 2;
      if (total(middle, measure) >= need) {
        bottom = middle;
      } else {
        top = middle - 1;
      }
    }
    return value_of(bottom);
  }

  const RowTask& task_;
  const int64_t tiles_;
};

}  // namespace foretoken::cuda

// Gumbel noise on every element that a law keeps; the first to finish wins. See math/gumbel.hpp,
// cpu/gumbel.cpp.
#pragma once

#include "cuda/cluster.cuh"
#include "cuda/law.cuh"
#include "cuda/views.cuh"
#include "math/gumbel.hpp"

namespace foretoken::cuda {

struct RaceEntry {
  double time = 0.0;
  int64_t element = -1;  // -1: nobody runs
};

// On ties the lower element.
__device__ inline bool finishes_first(const RaceEntry& a, const RaceEntry& b) {
  if (a.element < 0 || b.element < 0) return a.element >= 0 && b.element < 0;
  return a.time < b.time || (a.time == b.time && a.element < b.element);
}

// The elements of a row that one thread sees, each at its own time.
class Race {
 public:
  __device__ explicit Race(const RowLaw& law) : law_(law) {}

  __device__ void run(int64_t element, float logit, uint64_t bits) {
    if (!(logit >= law_.cut)) return;
    const double weight = static_cast<double>(weight_of_logit(logit, law_.max, law_.scale, law_.cut));
    const double uniform = race_uniform(bits);
    // Only below weight * best E / best weight can it win, as E is never smaller than its uniform.
    if (uniform > weight * reach_) return;
    const double log_weight =
        (static_cast<double>(logit) - static_cast<double>(law_.max)) * static_cast<double>(law_.scale) * kLn2;
    const RaceEntry entry{race_time(uniform, log_weight), element};
    if (!finishes_first(entry, best_)) return;
    best_ = entry;
    reach_ = race_exponential(uniform) / weight * 1.00001;  // the weight is only good to 1e-7
  }

  __device__ const RaceEntry& best() const { return best_; }

 private:
  const RowLaw& law_;
  RaceEntry best_;
  double reach_ = __builtin_inf();
};

// The winner among the tiles of this block; valid in its first thread.
__device__ inline RaceEntry race_in_block(const DeviceRow& row, const RowLaw& law, uint64_t seed,
                                          uint64_t position, const TensorView& vocab_map,
                                          RaceEntry (&warps)[kWarps]) {
  Race race(law);
  for_own_tiles(tiles_of(row.size), [&](int64_t index) {
    LaneTile tile;
    load_tile(row, index, false, tile);
#pragma unroll 1
    for (int i = 0; i < 32; i += 2) {
      float pair[2];
#pragma unroll
      for (int j = 0; j < 32; j += 2) {
        if (j == i) {
          pair[0] = tile.x[j];
          pair[1] = tile.x[j + 1];
        }
      }
      if (!(pair[0] >= law.cut || pair[1] >= law.cut)) continue;
      const int64_t first = index * kTile + LaneTile::element_of(i);
      const PhiloxWords words = gumbel_words(seed, position, first);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (first + j >= row.size) continue;
        const int64_t id = vocab_map ? read_index(vocab_map, first + j) : first + j;
        race.run(first + j, pair[j], gumbel_bits(vocab_map ? gumbel_words(seed, position, id) : words, id));
      }
    }
  });
  RaceEntry best = race.best();
#pragma unroll
  for (int lanes = 16; lanes >= 1; lanes /= 2) {
    RaceEntry other;
    other.time = __shfl_xor_sync(kAllLanes, best.time, lanes);
    other.element = __shfl_xor_sync(kAllLanes, best.element, lanes);
    if (finishes_first(other, best)) best = other;
  }
  if (lane_id() == 0) warps[threadIdx.x / kWarpSize] = best;
  block_sync();
  for (int warp = 0; warp < kWarps; ++warp) {
    if (finishes_first(warps[warp], best)) best = warps[warp];
  }
  block_sync();
  return best;
}

}  // namespace foretoken::cuda

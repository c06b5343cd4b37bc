// What rejected drafts leave of a target's row, and tokens drawn from it: cpu/residual.cpp on a device. Tiles
// are summed by all warps of a cluster, the token is found by one.
#pragma once

#include "cuda/law.cuh"

namespace foretoken::cuda {

struct MassEdit {
  int64_t token;
  uint64_t mass;    // of the token now
  uint64_t before;  // and in the target's law
};

// The target itself, [target - gain * draft]+ with a draft row, or the target with the masses of some tokens
// changed.
struct Residual {
  DeviceRow target;
  RowLaw target_law;
  const TileStats* stats = nullptr;  // of the target's tiles
  DeviceRow draft;                   // data == nullptr: none
  RowLaw draft_law;
  float gain = 0.0f;                // in weights
  const MassEdit* edits = nullptr;  // distinct tokens; without a draft row only
  int num_edits = 0;
};

__device__ inline float residual_weight(float of_target, float of_draft, float gain) {
  return fmaxf(fused(-gain, of_draft, of_target), 0.0f);
}

// The weights of a tile, quarter by quarter.
template <bool kWhole>
class WeightReader {
 public:
  __device__ WeightReader(const Residual& residual, int64_t index)
      : residual_(residual),
        target_(residual.target, index, false),
        draft_(residual.draft.data != nullptr ? residual.draft : residual.target, index, of_probs(residual)) {
  }

  __device__ __forceinline__ Eight next() {
    const RowLaw &target = residual_.target_law, &draft = residual_.draft_law;
    Eight weights = target_.next();
#pragma unroll
    for (int j = 0; j < 8; ++j)
      weights.x[j] = weight_of_logit(weights.x[j], target.max, target.scale, target.cut);
    if (residual_.draft.data == nullptr) return weights;
    Eight other = draft_.next();
    if (of_probs(residual_)) {
#pragma unroll
      for (int j = 0; j < 8; ++j) other.x[j] = weight_of_prob(other.x[j], draft.scale, draft.cut);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        // Of a recorded law that is not this row's; see cpu/row_kernels.inl.
        other.x[j] = weight_of_logit(fminf(other.x[j], draft.max), draft.max, draft.scale, draft.cut);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) weights.x[j] = residual_weight(weights.x[j], other.x[j], residual_.gain);
    return weights;
  }

 private:
  __device__ static bool of_probs(const Residual& residual) {
    return residual.draft.data != nullptr && residual.draft_law.kind == LawKind::probs;
  }

  const Residual residual_;  // a copy: kept in registers
  TileReader<kWhole> target_, draft_;
};

// Exact mass of a tile; edits are accounted for by whoever adds tiles up.
template <bool kWhole>
__device__ __noinline__ uint64_t exact_mass_of(const Residual& residual, int64_t index) {
  WeightReader<kWhole> reader(residual, index);
  uint64_t mass = 0;
#pragma unroll 1
  for (int quarter = 0; quarter < 4; ++quarter) {
    const Eight weights = reader.next();
#pragma unroll
    for (int j = 0; j < 8; ++j) mass += mass_of(weights.x[j]);
  }
  return sum_of_warp(mass);
}

// Sum of a tile's weights, in the pinned order.
template <bool kWhole>
__device__ __noinline__ float residual_sum_of(const Residual& residual, int64_t index) {
  WeightReader<kWhole> reader(residual, index);
  PinnedSum sum;
#pragma unroll 1
  for (int quarter = 0; quarter < 4; ++quarter) sum.add(quarter, reader.next());
  return sum.total();
}

// The element of a tile in whose interval `left` falls, counted in exact masses from element 0, and where
// that begins and ends; element -1: `left` lies behind them all. The same in every lane.
struct Interval {
  int32_t place;
  uint64_t begin, end;
};

template <bool kWhole>
__device__ __noinline__ Interval pick_in_tile_of(const Residual& residual, int64_t index, uint64_t left) {
  WeightReader<kWhole> reader(residual, index);
  uint64_t before = 0;
#pragma unroll 1
  for (int quarter = 0; quarter < 4; ++quarter) {
    const Eight weights = reader.next();
    const int32_t first = quarter * 256 + lane_id() * 8;
    uint64_t mass[8], mine = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) mass[j] = mass_of(weights.x[j]);
#pragma unroll 1
    for (int e = 0; e < residual.num_edits; ++e) {
      const MassEdit edit = residual.edits[e];
      if (edit.token / kTile != index) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (first + j == static_cast<int32_t>(edit.token % kTile)) mass[j] = edit.mass;
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) mine += mass[j];
    const uint64_t up_to = before + sum_up_to_lane(mine);
    const unsigned holders = __ballot_sync(kAllLanes, left < up_to);
    if (holders == 0) {
      before = __shfl_sync(kAllLanes, up_to, kWarpSize - 1);
      continue;
    }
    Interval found{-1, up_to - mine, up_to - mine};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (found.end <= left) {
        found.place = first + j;
        found.begin = found.end;
        found.end += mass[j];
      }
    }
    const int owner = __ffs(static_cast<int>(holders)) - 1;
    return {__shfl_sync(kAllLanes, found.place, owner), __shfl_sync(kAllLanes, found.begin, owner),
            __shfl_sync(kAllLanes, found.end, owner)};
  }
  return {-1, 0, 0};
}

__device__ inline bool reads_whole(const Residual& residual, int64_t index) {
  return reads_whole(residual.target, index) &&
         (residual.draft.data == nullptr || reads_whole(residual.draft, index));
}

__device__ inline uint64_t exact_mass(const Residual& residual, int64_t index) {
  return reads_whole(residual, index) ? exact_mass_of<true>(residual, index)
                                      : exact_mass_of<false>(residual, index);
}

__device__ inline float residual_sum(const Residual& residual, int64_t index) {
  return reads_whole(residual, index) ? residual_sum_of<true>(residual, index)
                                      : residual_sum_of<false>(residual, index);
}

__device__ inline Interval pick_in_tile(const Residual& residual, int64_t index, uint64_t left) {
  return reads_whole(residual, index) ? pick_in_tile_of<true>(residual, index, left)
                                      : pick_in_tile_of<false>(residual, index, left);
}

constexpr int64_t kUndecided = -2;

// How near to an interval's end a number may fall for masses of tiles that are estimates to decide, see
// cpu/residual.cpp: the sums of a residual's weights, or those that a law was made from.
__device__ inline uint64_t reach_of_estimate(uint64_t total, int64_t tiles, bool of_residual) {
  const double error = static_cast<double>(total) * (of_residual ? 6.5e-7 : 3.0e-6);
  const uint64_t units = (of_residual ? 2 : 256) * static_cast<uint64_t>(kTile);
  return 2 * (static_cast<uint64_t>(error) + units * static_cast<uint64_t>(tiles)) + 2;
}

// Finds the token of 64 random bits among the masses of the tiles, which are in shared memory. By one warp.
class TokenDraw {
 public:
  __device__ TokenDraw(const Residual& residual, uint64_t* masses)
      : residual_(residual), masses_(masses), tiles_(tiles_of(residual.target.size)) {}

  // The masses of a residual without a draft row.
  __device__ void take_masses_of_row() {
    for (int64_t index = lane_id(); index < tiles_; index += kWarpSize) {
      masses_[index] = mass_of_stats(read_stats(residual_.stats + index), residual_.target_law);
    }
    __syncwarp();
  }

  // From sums of tiles, each within a known error of the exact masses: nearly always that decides, see
  // cpu/residual.cpp. kUndecided if it does not.
  __device__ int64_t by_estimate(uint64_t bits) {
    const bool with_draft = residual_.draft.data != nullptr;
    uint64_t total = total_mass();
    const uint64_t reach = reach_of_estimate(total, tiles_, with_draft);
    if (residual_.num_edits > 0) {
      apply_edits(true);
      total = total_mass();
    }
    if (total / 4 < reach) return kUndecided;
    uint64_t left = multiply_high(bits, total);
    const int64_t index = tile_holding(left);
    const bool first = index == 0, last = index == tiles_ - 1;
    if ((!first && left < reach) || (!last && masses_[index] - left <= reach)) return kUndecided;
    const Interval found = pick_in_tile(residual_, index, left);
    if (found.place < 0 || (found.begin != 0 && left - found.begin < reach) || found.end - left <= reach) {
      return kUndecided;
    }
    return index * kTile + found.place;
  }

  // From exact masses; -1 if the residual has no mass at all.
  __device__ int64_t exactly(uint64_t bits) {
    apply_edits(false);
    const uint64_t total = total_mass();
    if (total == 0) return -1;
    uint64_t left = multiply_high(bits, total);  // uniform in [0, total)
    const int64_t index = tile_holding(left);
    return index * kTile + pick_in_tile(residual_, index, left).place;
  }

 private:
  // Of an estimate a tile may have less than what an edit takes away.
  __device__ void apply_edits(bool saturate) {
    if (residual_.num_edits == 0) return;
    if (lane_id() == 0) {
      for (int i = 0; i < residual_.num_edits; ++i) {
        const MassEdit edit = residual_.edits[i];
        uint64_t& mass = masses_[edit.token / kTile];
        const uint64_t removed = edit.before - edit.mass;
        mass = !saturate || mass > removed ? mass - removed : 0;
      }
    }
    __syncwarp();
  }

  __device__ uint64_t total_mass() const {
    uint64_t sum = 0;
    for (int64_t index = lane_id(); index < tiles_; index += kWarpSize) sum += masses_[index];
    return sum_of_warp(sum);
  }

  // The tile in which `left` falls; takes off what lies before it.
  __device__ int64_t tile_holding(uint64_t& left) const {
    for (int64_t first = 0; first < tiles_; first += kWarpSize) {
      const int64_t index = first + lane_id();
      const uint64_t mine = index < tiles_ ? masses_[index] : 0;
      const uint64_t up_to = sum_up_to_lane(mine);
      const unsigned holders = __ballot_sync(kAllLanes, left < up_to);
      if (holders != 0) {
        const int owner = __ffs(static_cast<int>(holders)) - 1;
        left -= __shfl_sync(kAllLanes, up_to - mine, owner);
        return first + owner;
      }
      left -= __shfl_sync(kAllLanes, up_to, kWarpSize - 1);
    }
    return tiles_ - 1;
  }

  const Residual& residual_;
  uint64_t* masses_;
  const int64_t tiles_;
};

}  // namespace foretoken::cuda

// What the blocks of a cluster keep of the chain that they verify together.
#pragma once

#include "cuda/chain_args.hpp"
#include "cuda/draw.cuh"
#include "cuda/filter.cuh"
#include "cuda/tile_stream.cuh"
#include "math/acceptance.hpp"

namespace foretoken::cuda {

constexpr int kMostChainRows = 2 * kMostChainDrafts + 1;  // of the target, then of the drafts

// A law, and the probability of the drafted token under it.
struct alignas(16) ChainRecord {
  RowLaw law;
  double prob;
};

// What is known of a node before any law is.
struct ChainNode {
  uint64_t closing_bits;
  int32_t token;  // that was drafted; -1: outside the vocabulary
  uint32_t coin;
  float of_target, of_draft;  // the element of its token in its parent's rows
};

// What the cluster does next; every block decides the same.
struct ChainStep {
  bool close;       // draw, and write the verdict down; else the mass of a residual is wanted
  bool summed;      // the masses of the residual's tiles are there already
  int32_t node;     // whose row it is
  int32_t status;   //
  double gain;      // of [target - gain * draft]+; < 0: the target's row alone
  int64_t removed;  // the one token that is not left of the row; -1: none
  uint64_t removed_mass;
  int64_t closing;  // -1: to be drawn ...
  uint64_t bits;    // ... by these
};

// Two buffers in turns: whoever is late may still read the one before.
struct DrawScratch {
  uint64_t masses[2][kMaxTiles];  // of a residual's tiles, to the last unit
  uint64_t sums[2][kMaxTiles];    // the same as the sum of their weights in float32 has it
  uint64_t warp_words[kWarps];
};

struct ChainShared {
  union {
    FilterScratch filter;  // while laws are made
    DrawScratch draw;      // behind that
  };
  ChainRecord records[kMostChainRows];
  ChainNode nodes[kWarpSize];  // in the first block
  RowReading reading[2];       // of the target, and of the drafts
  Filters filters[2];
  ChainStep step;
  int64_t drawn;
  uint64_t left, tile_mass;  // of a draw: what is left of its number in the tile that it fell into
  int32_t tile;
  int32_t is_last;
  int32_t unsolved[kMostChainRows];  // rows whose filters take a cluster; of the first block
  int32_t num_unsolved;
};

constexpr int64_t kLaneTiles = 256;  // of rows that long the lanes' largest elements find room

// Behind ChainShared, where there is no scratch in global memory. Of the one row that is read; in the first
// block.
struct RowScratch {
  TileStats stats[kMaxTiles];
  float lanes[kLaneTiles * kWarpSize];
};

__device__ __forceinline__ int64_t read_number(const Numbers& view, int64_t i, int64_t j = 0) {
  const int64_t offset = i * view.strides[0] + j * view.strides[1];
  return view.wide ? static_cast<const int64_t*>(view.data)[offset]
                   : static_cast<const int32_t*>(view.data)[offset];
}

__device__ __forceinline__ void write_number(const Numbers& view, int64_t value, int64_t i, int64_t j = 0) {
  const int64_t offset = i * view.strides[0] + j * view.strides[1];
  if (view.wide) {
    static_cast<int64_t*>(view.data)[offset] = value;
  } else {
    static_cast<int32_t*>(view.data)[offset] = static_cast<int32_t>(value);
  }
}

// The same in every lane. 64 bits in three parts, whose sums of 32 fit into 32 bits.
__device__ __forceinline__ uint64_t sum_of_masses(uint64_t mass) {
  constexpr uint64_t kPart = (1u << 22) - 1;
  const uint64_t low = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(mass & kPart));
  const uint64_t middle = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(mass >> 22 & kPart));
  const uint64_t high = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(mass >> 44));
  return low + (middle << 22) + (high << 44);
}

// The sum of mass_of(weight) over the at most 32 weights of a lane, in 32 bits and without conversions: a
// weight is split into a multiple of 2^-22 and a rest, and adding 1.5 * 2^n leaves each as a whole number in
// the low bits of a float.
class LaneMass {
 public:
  __device__ __forceinline__ void add(float weight) {
    const float shifted = weight + kCoarse;
    coarse_ += __float_as_uint(shifted);
    fine_ += __float_as_uint(fused(weight - (shifted - kCoarse), 0x1p44f, kFine));
    ++count_;
  }
  __device__ __forceinline__ uint64_t total() const {
    const uint32_t coarse = coarse_ - count_ * __float_as_uint(kCoarse);
    const int32_t fine = static_cast<int32_t>(fine_ - count_ * __float_as_uint(kFine));
    return (static_cast<uint64_t>(coarse) << 22) + static_cast<uint64_t>(static_cast<int64_t>(fine));
  }

 private:
  static constexpr float kCoarse = 3.0f;       // 1.5 * 2^23 * 2^-22
  static constexpr float kFine = 12582912.0f;  // 1.5 * 2^23
  uint32_t coarse_ = 0, fine_ = 0, count_ = 0;
};

}  // namespace foretoken::cuda

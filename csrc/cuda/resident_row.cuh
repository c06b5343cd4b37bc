// A row of logits in the shared memory of a cluster: read once, and looked at there as often as its filters
// ask for. Tile i belongs to block i modulo the blocks, and there to one warp for good, so that no pass over
// the row needs a barrier.
#pragma once

#include "cuda/chain_args.hpp"
#include "cuda/cluster.cuh"
#include "cuda/copy_ahead.cuh"
#include "cuda/filter_scratch.cuh"
#include "cuda/tile_stream.cuh"

namespace foretoken::cuda {

constexpr int kRowThreads = 1024, kRowWarps = kRowThreads / kWarpSize;  // of a block that holds a row
constexpr int kResidentBins = 512;
constexpr int kSampleBins = 1024;  // a thread for each
constexpr int kListBins = 1024;    // ... too
static_assert(kSampleBins <= 2 * kParts * kResidentBins && kListBins <= 2 * kResidentBins);
constexpr int kMostOwn = 128;  // tiles of a block
static_assert(kMostOwn * kTile * 2 > 228 * 1024);
constexpr int kOwnList = 2048;  // elements near a threshold that a block may list
static_assert(2 * kSampleBins <= kOwnList);
constexpr int kColumn = 96;  // elements of a tile that are looked at one by one

// A row and how it is read, which all threads know: kept here, as they have no registers for it.
struct ResidentTask {
  DeviceRow row;
  Filters filters;
  RowReading reading;
  float least_kept;  // how far below the largest min-p ends
  bool wanted;       // somebody asks for it
  int64_t request, number;
  int64_t token;  // that was drafted, or -1
  uint64_t bits;  // to draw with
};

// Fixed part of a block's shared memory.
struct ResidentShared {
  ResidentTask tasks[2];                         // the row's and the next one's, in turns
  uint32_t bins[2][kParts][kResidentBins];       // one is read by the cluster while the other is filled
  uint64_t partial[2][kMaxCluster * kRowWarps];  // masses that each warp of the cluster has found
  uint32_t keys[kOwnList];
  uint16_t places[kOwnList];  // tiles of the block that they lie in
  float columns[kRowWarps][kColumn];
  CopyBarrier arrived[kMostOwn];
  uint64_t warp_words[kRowWarps];
  float warp_floats[2][kRowWarps];
  uint64_t found[2];
  uint32_t listed;
  uint32_t few_keys[kWarpSize];
  uint32_t few;
  uint32_t reached[2];  // keys; 0: none, as both are to begin with
  float window, edges[2];
  int32_t tile;
  int32_t drawn;
  float of_drawn;
  uint64_t left;
};

__host__ __device__ constexpr int64_t resident_tile_bytes(int64_t element_bytes) {
  return kTile * element_bytes + kWarpSize * static_cast<int64_t>(sizeof(float));
}

// Of a block, where `own` is the most tiles that one has.
__host__ __device__ constexpr int64_t resident_bytes(int64_t tiles, int64_t own, int64_t element_bytes) {
  const int64_t fixed = (static_cast<int64_t>(sizeof(ResidentShared)) + 15) / 16 * 16;
  return fixed + (tiles + tiles % 2) * static_cast<int64_t>(sizeof(TileStats) + sizeof(uint64_t)) +
         own * resident_tile_bytes(element_bytes);
}

template <DType kType>
class ResidentRow {
 protected:
  static constexpr int kBytes = RawTile<kType>::kBytes;
  static constexpr int kLoads = RawTile<kType>::kLoads;

  __device__ __forceinline__ ResidentRow(const ChainArgs& args, unsigned char* memory)
      : args_(args),
        shared_(*reinterpret_cast<ResidentShared*>(memory)),
        rank_(cluster_rank()),
        size_(cluster_size()),
        warp_(threadIdx.x / kWarpSize),
        vocab_(static_cast<uint32_t>(args.vocab)),
        tiles_(static_cast<uint32_t>(tiles_of(args.vocab))) {
    const uint32_t room = tiles_ + tiles_ % 2;
    stats_ = reinterpret_cast<TileStats*>(memory + (sizeof(ResidentShared) + 15) / 16 * 16);
    masses_ = reinterpret_cast<uint64_t*>(stats_ + room);
    lane_highs_ = reinterpret_cast<float*>(masses_ + room);
    row_ = reinterpret_cast<unsigned char*>(lane_highs_ + (tiles_ + size_ - 1) / size_ * kWarpSize);
  }

  // body(number among this block's tiles, number among the row's) for this warp's tiles.
  template <class Body>
  __device__ __forceinline__ void for_own(const Body& body) const {
#pragma unroll 1
    for (uint32_t local = warp_; local * size_ + rank_ < tiles_; local += kRowWarps) {
      body(local, local * size_ + rank_);
    }
  }

  __device__ __forceinline__ unsigned char* tile(uint32_t local) const {
    return row_ + local * (kTile * kBytes);
  }

  // A lane's neighbours of a quarter, as they come to it: where four of them fill 16 bytes, every other four
  // lanes have the last four first, so that what a warp reads at a time is in different banks. Sums in the
  // pinned order are the same, as which half is added to which makes no difference.
  static __device__ __forceinline__ uint32_t swapped() { return kLoads == 2 ? lane_id() & 4u : 0; }
  __device__ __forceinline__ uint4 words_of(uint32_t local, int quarter, int load) const {
    const uint32_t at = quarter * 256 + lane_id() * 8 + (static_cast<uint32_t>(load * 4) ^ swapped());
    return *reinterpret_cast<const uint4*>(tile(local) + at * kBytes);
  }

  __device__ __forceinline__ void begin_barriers() const {
    if (lane_id() == 0) {
      for_own([&](uint32_t local, uint32_t) { begin_barrier(&shared_.arrived[local]); });
      barriers_begun();
    }
  }

  // All tiles of this warp, or one by one what nobody needs any more of the row before.
  __device__ __forceinline__ void begin_loading(const void* data) {
    for_own([&](uint32_t local, uint32_t index) { begin_loading(data, local, index); });
    loading_begun();
  }
  __device__ __forceinline__ void loading_begun() { turn_of_copies_ ^= 1; }
  __device__ __forceinline__ void begin_loading(const void* data, uint32_t local, uint32_t index) const {
    __syncwarp();
    const uint32_t left = vocab_ - index * kTile, count = left < kTile ? left : kTile;
    unsigned char* const to = tile(local);
    if (args_.aligned) {
      const char* const from = static_cast<const char*>(data) + static_cast<uint64_t>(index) * kTile * kBytes;
      if (lane_id() == 0) copy_ahead(to, from, count * kBytes, &shared_.arrived[local]);
      for (uint32_t i = count * kBytes + lane_id() * 16; i < kTile * kBytes; i += kWarpSize * 16) {
        *reinterpret_cast<uint4*>(to + i) = TileOfRow<kType>::load_words(data, 0, 0, true);
      }
    } else {
      load_by_elements(to, data, vocab_, index);
    }
    __syncwarp();
  }
  static __device__ __noinline__ void load_by_elements(unsigned char* to, const void* data, int64_t vocab,
                                                       uint32_t index) {
#pragma unroll 1
    for (uint32_t i = lane_id(); i < kTile * kBytes / 16; i += kWarpSize) {
      *reinterpret_cast<uint4*>(to + i * 16) = TileOfRow<kType>::load_words(
          data, static_cast<uint32_t>(vocab), index * kTile + i * (16 / kBytes), false);
    }
  }

  __device__ __forceinline__ void wait_for_tile(uint32_t local) const {
    if (args_.aligned) wait_for_copy(&shared_.arrived[local], turn_of_copies_);
  }

  // The statistics of all tiles, to all blocks; behind a barrier of the cluster. look(number, largest) for
  // each tile of the warp.
  template <class Look>
  __device__ __forceinline__ void leave_stats(const RowReading& reading, TileStats* out,
                                              const Look& look) const {
    for_own([&](uint32_t local, uint32_t index) {
      wait_for_tile(local);
      float high = -infinity();
      const TileStats found = stats_of(local, reading, high);
      lane_highs_[local * kWarpSize + lane_id()] = high;
      const float2 words = make_float2(found.max, found.sum);
      if (static_cast<uint32_t>(lane_id()) < size_) {
        *reinterpret_cast<float2*>(of_block(stats_ + index, static_cast<uint32_t>(lane_id()))) = words;
      }
      if (out != nullptr && lane_id() == 0) *reinterpret_cast<float2*>(out + index) = words;
      look(local, found.max);
    });
  }

  // As by TileSummary, but that elements are read again for the sum, for which there are no registers.
  __device__ __forceinline__ TileStats stats_of(uint32_t local, const RowReading& reading,
                                                float& lane_max) const {
    RawTile<kType> raw;
#pragma unroll
    for (int i = 0; i < 4 * kLoads; ++i) raw.words[i] = words_of(local, i / kLoads, i % kLoads);
    const bool sums = reading.kind == LawKind::logits;
    float low = 0.0f;
    if (sums) {
      raw.bounds(lane_max, low);
      const float max = max_of_warp(lane_max), anchor = max == -infinity() ? 0.0f : max;
      if (__all_sync(kAllLanes, low >= anchor - reading.surely)) {
        return {max, sum_of_all(local, anchor, reading.scale)};
      }
    } else {
      const TileStats found = stats_of_greedy(raw, lane_max);
      if (found.sum != kAgain) return found;
    }
    raw.extremes(lane_max, low);
    lane_max = lane_max == lane_max ? lane_max : -infinity();
    const float max = max_of_warp(lane_max), anchor = max > -infinity() ? max : 0.0f;
    if (!sums) return {max, __int_as_float(0x7FC00000)};
    return {max, sum_of_many(local, anchor, reading.scale, reading.floor_below(anchor))};
  }

  // Of the weights of a tile in which every element has one.
  __device__ __forceinline__ float sum_of_all(uint32_t local, float anchor, float scale) const {
    PinnedSum sum;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      Eight eight = quarter_of(local, quarter);
#pragma unroll
      for (int j = 0; j < 8; ++j) eight.x[j] = exp2_scaled(eight.x[j] - anchor, scale);
      sum.add(quarter, eight);
    }
    return sum.total();
  }

  // Of the weights of those elements of a tile that are not below a cut.
  __device__ __forceinline__ float sum_of_many(uint32_t local, float anchor, float scale, float cut) const {
    PinnedSum sum;
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
      Eight eight = quarter_of(local, quarter);
#pragma unroll
      for (int j = 0; j < 8; ++j) eight.x[j] = weight_of_logit(eight.x[j], anchor, scale, cut);
      sum.add(quarter, eight);
    }
    return sum.total();
  }

  __device__ __forceinline__ Eight quarter_of(uint32_t local, int quarter) const {
    Eight eight;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      unpack_words<kType>(words_of(local, quarter, i), eight.x + i * (8 / kLoads));
    }
    return eight;
  }

  __device__ __forceinline__ float element_of_lane(uint32_t local, int quarter, int neighbour) const {
    const uint32_t place = quarter * 256 + lane_id() * 8 + (static_cast<uint32_t>(neighbour) ^ swapped());
    const unsigned char* const at = tile(local) + place * kBytes;
    if constexpr (kType == DType::float32) return *reinterpret_cast<const float*>(at);
    const uint32_t bits = *reinterpret_cast<const uint16_t*>(at);
    return kType == DType::bfloat16 ? float_of_bfloat(bits) : float_of_half(bits);
  }

  // A bit for each of this lane's elements that pass: neighbour by neighbour, of each the four quarters,
  // which is the order in which they are folded.
  template <class Test>
  __device__ __forceinline__ uint32_t mark(uint32_t local, const Test& test) const {
    uint32_t marks = 0;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const Eight eight = quarter_of(local, quarter);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (test(eight.x[j])) marks |= 1u << (4 * j + quarter);
      }
    }
    return marks;
  }
  static __device__ __forceinline__ int last_bit(uint32_t marks) {
    return 31 - __clz(static_cast<int>(marks));
  }
  // The first marked element; without any mark just one.
  __device__ __forceinline__ float first_marked(uint32_t local, uint32_t marks) const {
    const int bit = __ffs(static_cast<int>(marks | 0x80000000u)) - 1;
    return element_of_lane(local, bit % 4, bit / 4);
  }

  // body(whether this lane has one, it, its mark) for the marked elements of all lanes, one of each at a
  // time.
  template <class Body>
  __device__ __forceinline__ void for_marked(uint32_t local, uint32_t marks, const Body& body) const {
#pragma unroll 1
    for (; __any_sync(kAllLanes, marks != 0); marks &= marks - 1) {
      body(marks != 0, first_marked(local, marks), marks & -marks);
    }
  }

  const ChainArgs& args_;
  ResidentShared& shared_;
  const uint32_t rank_, size_, warp_, vocab_, tiles_;
  TileStats* stats_;    // [tiles]
  uint64_t* masses_;    // [tiles]
  float* lane_highs_;   // [own tiles, 32]
  unsigned char* row_;  // [own tiles, a tile]
  uint32_t turn_of_copies_ = 1;
};

}  // namespace foretoken::cuda

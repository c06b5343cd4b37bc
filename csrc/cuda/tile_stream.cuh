// Tiles of rows whose dtype is known when this is compiled. Nothing is looked at twice: what is cut by the
// end of a row, or reaches too far below its largest element, is summed on the spot.
#pragma once

#include "cuda/tile_stats.cuh"

namespace foretoken::cuda {

template <DType kType>
struct TileOfRow {
  static constexpr int kBytes = RawTile<kType>::kBytes;
  static constexpr int kLoads = RawTile<kType>::kLoads;
  static constexpr int kEach = 16 / kBytes;  // elements of one load

  // A tile; what lies behind the row's end is -infinity. `aligned`: rows begin and end at multiples of 16
  // bytes.
  static __device__ __forceinline__ void load(RawTile<kType>& raw, const void* data, uint32_t size,
                                              uint32_t index, bool aligned) {
    if (aligned && (index + 1) * kTile <= size) return raw.load(data, index);
#pragma unroll
    for (int i = 0; i < 4 * kLoads; ++i) {
      raw.words[i] = load_words(
          data, size, index * kTile + i / kLoads * 256 + lane_id() * 8 + i % kLoads * kEach, aligned);
    }
  }

  static __device__ __forceinline__ uint4 load_words(const void* data, uint32_t size, uint32_t at,
                                                     bool aligned) {
    constexpr uint32_t kPad = minus_infinity_bits<kType>();
    constexpr uint32_t kPads = kBytes == 4 ? kPad : kPad << 16 | kPad;
    uint4 words = make_uint4(kPads, kPads, kPads, kPads);
    if (aligned) {
      const char* base = static_cast<const char*>(data) + static_cast<uint64_t>(at) * kBytes;
      if (at < size) words = __ldg(reinterpret_cast<const uint4*>(base));
    } else if constexpr (kBytes == 4) {
      const uint32_t* elements = static_cast<const uint32_t*>(data);
      if (at < size) words.x = elements[at];
      if (at + 1 < size) words.y = elements[at + 1];
      if (at + 2 < size) words.z = elements[at + 2];
      if (at + 3 < size) words.w = elements[at + 3];
    } else {
      const uint16_t* elements = static_cast<const uint16_t*>(data);
      uint32_t* word = &words.x;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t low = at + 2 * w < size ? elements[at + 2 * w] : kPad;
        const uint32_t high = at + 2 * w + 1 < size ? elements[at + 2 * w + 1] : kPad;
        word[w] = low | high << 16;
      }
    }
    return words;
  }
};

// The first quarter of a tile; the others move up.
template <DType kType>
__device__ __forceinline__ Eight next_quarter(RawTile<kType>& raw) {
  constexpr int kLoads = RawTile<kType>::kLoads;
  Eight eight;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) unpack_words<kType>(raw.words[i], eight.x + i * (8 / kLoads));
#pragma unroll
  for (int i = 0; i < 3 * kLoads; ++i) raw.words[i] = raw.words[i + kLoads];
  return eight;
}

// Only those elements count that have a weight. `sums`: else there is NaN in a row of which no sum is wanted.
template <DType kType>
__device__ __forceinline__ TileStats stats_of_some(RawTile<kType>& raw, const RowReading& reading, bool sums,
                                                   float& lane_max) {
  float high, low;
  raw.extremes(high, low);
  lane_max = high == high ? high : -infinity();
  const float max = max_of_warp(lane_max), anchor = max > -infinity() ? max : 0.0f;
  if (!sums) return {max, __int_as_float(0x7FC00000)};
  const float cut = reading.floor_below(anchor);
  PinnedSum sum;
#pragma unroll 1
  for (int quarter = 0; quarter < 4; ++quarter) {
    Eight x = next_quarter(raw);
#pragma unroll
    for (int j = 0; j < 8; ++j) x.x[j] = weight_of_logit(x.x[j], anchor, reading.scale, cut);
    sum.add(quarter, x);
  }
  return {max, sum.total()};
}

// False: what is left to do is the sum of all weights relative to `anchor`. `lane_max`: the largest of the 32
// elements that this lane holds.
template <DType kType>
__device__ __forceinline__ bool settles(RawTile<kType>& raw, const RowReading& reading, TileStats& stats,
                                        float& anchor, float& lane_max) {
  if (reading.kind == LawKind::point) {
    stats = stats_of_greedy(raw, lane_max);
    if (stats.sum != kAgain) return true;
  }
  const bool sums = reading.kind == LawKind::logits;
  float high, low;
  raw.bounds(high, low);
  lane_max = high;
  stats.max = max_of_warp(high);
  anchor = stats.max == -infinity() ? 0.0f : stats.max;
  // Nearly always every element has a weight; then none has to be compared. Of NaN no comparison is true.
  if (sums && !__any_sync(kAllLanes, !(low >= anchor - reading.surely))) return false;
  stats = stats_of_some(raw, reading, sums, lane_max);
  return true;
}

template <DType kType>
__device__ __forceinline__ TileStats stats_of_tile(RawTile<kType>& raw, const RowReading& reading,
                                                   float& lane_max) {
  TileStats stats;
  float anchor;
  if (settles(raw, reading, stats, anchor, lane_max)) return stats;
  LaneTile tile;
  raw.unpack(tile);
  stats.sum = sum_of_tile([&](int i) { return exp2_scaled(tile.x[i] - anchor, reading.scale); });
  return stats;
}

// The same in two steps. The first leaves the tile's registers free, so that another can be asked for before
// the second, which is most of the work.
template <DType kType>
class TileSummary {
 public:
  __device__ __forceinline__ void begin(RawTile<kType>& raw, const RowReading& reading, float& lane_max) {
    float anchor;
    settled_ = settles(raw, reading, stats_, anchor, lane_max);
    if (settled_) return;
    LaneTile tile;
    raw.unpack(tile);
#pragma unroll
    for (int i = 0; i < 32; ++i) distances_[i] = tile.x[i] - anchor;
    scale_ = reading.scale;
  }

  __device__ __forceinline__ TileStats end() {
    if (!settled_) stats_.sum = sum_of_tile([&](int i) { return exp2_scaled(distances_[i], scale_); });
    return stats_;
  }

 private:
  TileStats stats_;
  float distances_[32], scale_;
  bool settled_;
};

}  // namespace foretoken::cuda

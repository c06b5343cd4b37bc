// The first pass over a row: what each tile of 1024 elements holds, in two floats. Everything that is asked
// about a row later (its law, a filter's threshold, a token drawn from it) starts from these.
#pragma once

#include "cuda/tile.cuh"

namespace foretoken::cuda {

// Of logits: the sum of weights relative to the tile's own largest element. Of probabilities: their sum. Of a
// greedy row: 0. A NaN anywhere in the tile makes the sum of logits larger than kTile, the others NaN.
struct TileStats {
  float max;
  float sum;
};

// How the elements of a row are read.
struct RowReading {
  LawKind kind = LawKind::logits;  // point: only the largest element is wanted
  float scale = 0.0f;              // of logits
  double reach = 0.0;              // how far below the largest a logit still has a weight
  float surely = 0.0f;             // a little less than that

  static __device__ RowReading of_logits(float temperature) {
    RowReading reading;
    if (temperature == 0.0f) {
      reading.kind = LawKind::point;
      return reading;
    }
    reading.scale = logits_scale(temperature);
    reading.reach = 125.0 / static_cast<double>(reading.scale);
    reading.surely = static_cast<float>(0.99 * reading.reach);
    return reading;
  }
  static __device__ RowReading of_probs() {
    RowReading reading;
    reading.kind = LawKind::probs;
    return reading;
  }
  __device__ float floor_below(float max) const {  // logits_floor of math/row_law.hpp
    return static_cast<float>(static_cast<double>(max) - reach);
  }
};

constexpr float kLeastProb = 1.17549435e-38f;  // FLT_MIN: what is smaller counts as nothing

__device__ inline float max_or_nan(float a, float b) {
  float max;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(max) : "f"(a), "f"(b));
  return max;
}

// Sum of the weights of a tile's logits that are at least `cut`, relative to `anchor`.
__device__ inline float sum_of_weights(const LaneTile& tile, float anchor, float scale, float cut) {
  return sum_of_tile([&](int i) { return weight_of_logit(tile.x[i], anchor, scale, cut); });
}

inline __device__ __noinline__ float sum_of_weights_at(const DeviceRow& row, int64_t index, float anchor,
                                                float scale, float cut) {
  LaneTile tile;
  load_tile_here(row, index, false, tile);
  return sum_of_weights(tile, anchor, scale, cut);
}

// `lane_max`, if wanted: the largest of the 32 elements that this lane holds.
template <DType kType>
__device__ inline TileStats stats_of_logits(const RawTile<kType>& raw, const DeviceRow& row, int64_t index,
                                            const RowReading& reading, float& lane_max) {
  float high, low;
  raw.extremes(high, low);
  high = high == high ? high : -infinity();
  lane_max = high;
  const float max = max_of_warp(high);
  const float anchor = max > -infinity() ? max : 0.0f;
  // Nearly always every element has a weight; then none has to be compared.
  if (__any_sync(kAllLanes, low < anchor - reading.surely)) {
    return {max, sum_of_weights_at(row, index, anchor, reading.scale, reading.floor_below(anchor))};
  }
  LaneTile tile;
  raw.unpack(tile);
  return {max, sum_of_tile([&](int i) { return exp2_scaled(tile.x[i] - anchor, reading.scale); })};
}

template <DType kType>
__device__ inline TileStats stats_of_greedy(const RawTile<kType>& raw) {
  LaneTile tile;
  raw.unpack(tile);
  float high = tile.x[0];
#pragma unroll
  for (int i = 1; i < 32; ++i) high = max_or_nan(high, tile.x[i]);
  const bool nan = __any_sync(kAllLanes, high != high);
  if (nan) {
    high = -infinity();
#pragma unroll
    for (int i = 0; i < 32; ++i) high = fmaxf(high, tile.x[i]);
  }
  return {max_of_warp(high), nan ? __int_as_float(0x7FC00000) : 0.0f};
}

// A negative probability makes the sum NaN as well.
template <DType kType>
__device__ inline TileStats stats_of_probs(const RawTile<kType>& raw) {
  LaneTile tile;
  raw.unpack(tile);
  float high = tile.x[0], low = tile.x[0];
#pragma unroll
  for (int i = 1; i < 32; ++i) {
    high = max_or_nan(high, tile.x[i]);
    low = fminf(low, tile.x[i]);
  }
  if (__any_sync(kAllLanes, high != high || low < 0.0f)) return {0.0f, __int_as_float(0x7FC00000)};
  const float sum = sum_of_tile([&](int i) { return tile.x[i] < kLeastProb ? 0.0f : tile.x[i]; });
  return {max_of_warp(high), sum};
}

template <DType kType>
__device__ inline TileStats stats_of_tile(const RawTile<kType>& raw, const DeviceRow& row, int64_t index,
                                          const RowReading& reading, float& lane_max) {
  switch (reading.kind) {
    case LawKind::logits: return stats_of_logits(raw, row, index, reading, lane_max);
    case LawKind::probs: return stats_of_probs(raw);
    default: return stats_of_greedy(raw);
  }
}

// A row whose law is wanted, and where its statistics go.
struct RowTask {
  DeviceRow row;
  RowReading reading;
  TileStats* stats = nullptr;  // [tiles]
  float* lanes = nullptr;      // [tiles, 32] largest element of each lane, for filters; null: not wanted
};

// One row among those that are read together.
struct WaveRow {
  const void* data;
  TileStats* stats;
  float* lanes;
};

struct Wave {
  const WaveRow* rows;  // [count] in shared memory
  uint32_t first_draft, count;
  int64_t size;  // of every row
  RowReading of_target, of_draft;
};

// Reads the rows of a wave, one tile a warp and another on its way meanwhile. This warp takes the tiles
// worker, worker + workers, ... of all.
template <DType kType>
inline __device__ __noinline__ void read_rows(const Wave& wave, uint32_t worker, uint32_t workers) {
  const uint32_t tiles = static_cast<uint32_t>((wave.size + kTile - 1) / kTile), items = wave.count * tiles;
  const int64_t size = wave.size;
  const auto load = [&](RawTile<kType>& raw, uint32_t row, uint32_t index) {
    const LawKind kind = row < wave.first_draft ? wave.of_target.kind : wave.of_draft.kind;
    const uint32_t pad = kind == LawKind::probs ? 0u : minus_infinity_bits<kType>();
    raw.load({wave.rows[row].data, kType, size}, index, pad);
  };
  if (worker >= items) return;
  RawTile<kType> raw;
  uint32_t row = worker / tiles, index = worker % tiles;
  load(raw, row, index);
  for (uint32_t item = worker;;) {
    const uint32_t next = item + workers, next_row = next / tiles, next_index = next % tiles;
    RawTile<kType> coming;
    if (next < items) load(coming, next_row, next_index);
    const RowReading& reading = row < wave.first_draft ? wave.of_target : wave.of_draft;
    float lane_max = -infinity();
    const TileStats stats = stats_of_tile(raw, {wave.rows[row].data, kType, size}, index, reading, lane_max);
    if (lane_id() == 0) wave.rows[row].stats[index] = stats;
    if (float* lanes = wave.rows[row].lanes) lanes[index * kWarpSize + lane_id()] = lane_max;
    if (next >= items) return;
    item = next;
    row = next_row;
    index = next_index;
    raw = coming;
  }
}

}  // namespace foretoken::cuda

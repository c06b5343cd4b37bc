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

// `lane_max`, if wanted: the largest of the 32 elements that this lane holds.
template <DType kType>
__device__ inline TileStats stats_of_logits(const RawTile<kType>& raw, const RowReading& reading,
                                            float& lane_max) {
  float high, low;
  raw.extremes(high, low);
  high = high == high ? high : -infinity();
  lane_max = high;
  const float max = max_of_warp(high);
  const float anchor = max > -infinity() ? max : 0.0f;
  LaneTile tile;
  raw.unpack(tile);
  // Nearly always every element has a weight; then none has to be compared.
  if (__any_sync(kAllLanes, low < anchor - reading.surely)) {
    return {max, sum_of_weights(tile, anchor, reading.scale, reading.floor_below(anchor))};
  }
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
__device__ inline TileStats stats_of_tile(const RawTile<kType>& raw, const RowReading& reading,
                                          float& lane_max) {
  switch (reading.kind) {
    case LawKind::logits: return stats_of_logits(raw, reading, lane_max);
    case LawKind::probs: return stats_of_probs(raw);
    default: return stats_of_greedy(raw);
  }
}

// One row among those that a wave of reading covers, and where its statistics go.
struct RowTask {
  DeviceRow row;
  RowReading reading;
  TileStats* stats = nullptr;  // [tiles]
  float* lanes = nullptr;      // [tiles, 32] largest element of each lane, for filters; null: not wanted
};

// Reads `count` rows of one dtype, `tiles` tiles each, one tile a warp and another on its way meanwhile.
// `task_of(i)` describes row i; this warp takes the items first, first + step, ...
template <DType kType, class TaskOf>
__device__ inline void read_rows(int64_t count, int64_t tiles, int64_t first, int64_t step, TaskOf task_of) {
  const int64_t items = count * tiles;
  if (first >= items) return;
  RowTask task = task_of(first / tiles);
  int64_t row = first / tiles, index = first % tiles;
  RawTile<kType> raw;
  const auto pad = [](const RowTask& of) {
    return of.reading.kind == LawKind::probs ? 0u : minus_infinity_bits<kType>();
  };
  raw.load(task.row, index, pad(task));
  for (int64_t item = first;;) {
    const int64_t next = item + step;
    int64_t next_row = row, next_index = index + step;
    while (next_index >= tiles && next < items) {
      next_index -= tiles;
      ++next_row;
    }
    RowTask next_task = task;
    RawTile<kType> coming;
    if (next < items) {
      if (next_row != row) next_task = task_of(next_row);
      coming.load(next_task.row, next_index, pad(next_task));
    }
    float lane_max = -infinity();
    const TileStats stats = stats_of_tile(raw, task.reading, lane_max);
    if (lane_id() == 0) task.stats[index] = stats;
    if (task.lanes != nullptr) task.lanes[index * kWarpSize + lane_id()] = lane_max;
    if (next >= items) return;
    item = next;
    row = next_row;
    index = next_index;
    task = next_task;
    raw = coming;
  }
}

}  // namespace foretoken::cuda

// The first pass over a row: what each tile of 1024 elements holds, in two floats. Everything that is asked
// about a row later (its law, a filter's threshold, a token drawn from it) starts from these.
#pragma once

#include "cuda/tile.cuh"
#include "ops/tile_stats.hpp"

namespace foretoken::cuda {

// TileStats::sum of probabilities is their own sum. A NaN anywhere in the tile makes the sum of logits larger
// than kTile, the others NaN.

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

template <bool kWhole>
__device__ __forceinline__ float sum_of_weights_in(const DeviceRow& row, int64_t index, float anchor,
                                                   float scale, float cut) {
  TileReader<kWhole> tile(row, index, false);
  PinnedSum sum;
#pragma unroll 1
  for (int quarter = 0; quarter < 4; ++quarter) {
    Eight x = tile.next();
#pragma unroll
    for (int j = 0; j < 8; ++j) x.x[j] = weight_of_logit(x.x[j], anchor, scale, cut);
    sum.add(quarter, x);
  }
  return sum.total();
}

inline __device__ __noinline__ float sum_of_weights_at(const DeviceRow row, int64_t index, float anchor,
                                                       float scale, float cut) {
  return reads_whole(row, index) ? sum_of_weights_in<true>(row, index, anchor, scale, cut)
                                 : sum_of_weights_in<false>(row, index, anchor, scale, cut);
}

// A tile that has to be looked at again, element by element.
constexpr float kAgain = -1.0f;

// `lane_max`: the largest of the 32 elements that this lane holds.
template <DType kType>
__device__ __forceinline__ TileStats stats_of_logits(const RawTile<kType>& raw, const RowReading& reading,
                                                     float& lane_max) {
  float high, low;
  raw.extremes(high, low);
  high = high == high ? high : -infinity();
  lane_max = high;
  const float max = max_of_warp(high);
  const float anchor = max > -infinity() ? max : 0.0f;
  // Nearly always every element has a weight; then none has to be compared.
  if (__any_sync(kAllLanes, low < anchor - reading.surely)) return {max, kAgain};
  LaneTile tile;
  raw.unpack(tile);
  return {max, sum_of_tile([&](int i) { return exp2_scaled(tile.x[i] - anchor, reading.scale); })};
}

template <DType kType>
__device__ __forceinline__ TileStats stats_of_greedy(const RawTile<kType>& raw, float& lane_max) {
  LaneTile tile;
  raw.unpack(tile);
  float high = tile.x[0];
#pragma unroll
  for (int i = 1; i < 32; ++i) high = max_or_nan(high, tile.x[i]);
  if (__any_sync(kAllLanes, high != high)) return {0.0f, kAgain};
  lane_max = high;
  return {max_of_warp(high), 0.0f};
}

// The same of any tile, by the code that takes its time.
inline __device__ __noinline__ TileStats stats_slowly(const DeviceRow& row, const RowReading& reading,
                                                      int64_t index, float& lane_max) {
  const bool probs = reading.kind == LawKind::probs;
  TileReader<false> tile(row, index, probs);
  float high = -infinity(), low = 0.0f;
  bool nan = false;
  PinnedSum sum;
#pragma unroll 1
  for (int quarter = 0; quarter < 4; ++quarter) {
    Eight eight = tile.next();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      high = fmaxf(high, eight.x[j]);
      low = fminf(low, eight.x[j]);
      nan = nan || eight.x[j] != eight.x[j];
      eight.x[j] = eight.x[j] < kLeastProb ? 0.0f : eight.x[j];
    }
    if (probs) sum.add(quarter, eight);
  }
  lane_max = high;
  nan = __any_sync(kAllLanes, nan || (probs && low < 0.0f)) != 0;
  const float max = max_of_warp(high), none = __int_as_float(0x7FC00000);
  if (reading.kind == LawKind::point) return {max, nan ? none : 0.0f};
  if (probs) return {max, nan ? none : sum.total()};
  const float anchor = max > -infinity() ? max : 0.0f;
  return {max, sum_of_weights_at(row, index, anchor, reading.scale, reading.floor_below(anchor))};
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
  const WaveRow* rows = nullptr;  // [count] in shared memory
  uint32_t count = 0;
  DType dtype = DType::float32;  // of every row
  int64_t size = 0;
  RowReading reading;

  __device__ uint32_t tiles() const { return static_cast<uint32_t>(tiles_of(size)); }
};

// Reads the rows of a wave, one tile a warp. This warp takes the tiles worker, worker + workers, ... of all.
// No call is made from here: values that live across calls live in memory, and what sixteen warps keep there
// does not fit the first-level cache. True: some tile is left to read_again().
template <DType kType>
__device__ __forceinline__ bool read_whole_tiles(const Wave& wave, uint32_t worker, uint32_t workers) {
  const uint32_t tiles = wave.tiles(), items = wave.count * tiles;
  const int64_t size = wave.size;
  const RowReading reading = wave.reading;
  const WaveRow* const rows = wave.rows;
  bool again = false;
#pragma unroll 1
  for (uint32_t item = worker; item < items; item += workers) {
    const WaveRow& row = rows[item / tiles];
    const uint32_t index = item % tiles;
    float lane_max = -infinity();
    TileStats stats{0.0f, kAgain};
    if (reads_whole({row.data, kType, size}, index) && reading.kind != LawKind::probs) {
      RawTile<kType> raw;
      raw.load(row.data, index);
      stats = reading.kind == LawKind::logits ? stats_of_logits(raw, reading, lane_max)
                                              : stats_of_greedy(raw, lane_max);
    }
    again = again || stats.sum == kAgain;
    if (lane_id() == 0) row.stats[index] = stats;
    if (float* lanes = row.lanes) lanes[index * kWarpSize + lane_id()] = lane_max;
  }
  return again;
}

// The tiles that were left: cut by the end of the row, of unusual numbers, of probabilities.
inline __device__ __noinline__ void read_again(const Wave& wave, uint32_t worker, uint32_t workers) {
  const uint32_t tiles = wave.tiles(), items = wave.count * tiles;
  __syncwarp();
  for (uint32_t item = worker; item < items; item += workers) {
    const WaveRow& row = wave.rows[item / tiles];
    const uint32_t index = item % tiles;
    if (row.stats[index].sum != kAgain) continue;
    float lane_max = -infinity();
    const TileStats stats = stats_slowly({row.data, wave.dtype, wave.size}, wave.reading, index, lane_max);
    __syncwarp();
    if (lane_id() == 0) row.stats[index] = stats;
    if (row.lanes != nullptr) row.lanes[index * kWarpSize + lane_id()] = lane_max;
  }
}

__device__ __forceinline__ void read_rows(const Wave& wave, uint32_t worker, uint32_t workers) {
  bool again = false;
  switch (wave.dtype) {
    case DType::float32: again = read_whole_tiles<DType::float32>(wave, worker, workers); break;
    case DType::bfloat16: again = read_whole_tiles<DType::bfloat16>(wave, worker, workers); break;
    default: again = read_whole_tiles<DType::float16>(wave, worker, workers); break;
  }
  if (again) read_again(wave, worker, workers);
}

// Two waves, one behind the other.
inline __device__ __noinline__ void read_waves(const Wave (&waves)[2], uint32_t worker, uint32_t workers) {
#pragma unroll 1
  for (const Wave& wave : waves) {
    if (wave.count == 0) continue;
    read_rows(wave, worker, workers);
    // Whoever had least to do here begins there.
    worker = (worker + workers - wave.count * wave.tiles() % workers) % workers;
  }
}

}  // namespace foretoken::cuda

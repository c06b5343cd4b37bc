// From the statistics of a row's tiles to its law, by one warp. The numbers are those of cpu/rows.cpp bit by
// bit: tile sums in their pinned order, everything across tiles in integers.
#pragma once

#include "cuda/mass.cuh"
#include "cuda/tile_stats.cuh"

namespace foretoken::cuda {

constexpr int kMaxTiles = 1024;  // kMaxVocab / kTile, rounded up

// Written by any block of the cluster, into global or shared memory: an ordinary load behind its barrier.
__device__ inline TileStats read_stats(const TileStats* stats) {
  const float2 words = *reinterpret_cast<const float2*>(stats);
  return {words.x, words.y};
}

// Lowest id of the largest element `high` of a row; 0 if the row has none. By a warp.
inline __device__ __noinline__ int64_t lowest_of(const DeviceRow& row, const TileStats* stats, float high) {
  const int64_t tiles = tiles_of(row.size);
  if (!(high > -infinity())) return 0;
  unsigned first = ~0u;
  for (int64_t index = lane_id(); index < tiles && first == ~0u; index += kWarpSize) {
    if (read_stats(stats + index).max == high) first = static_cast<unsigned>(index);
  }
  first = __reduce_min_sync(kAllLanes, first);
  if (first == ~0u) return 0;
  LaneTile tile;
  load_tile(row, first, false, tile);
  unsigned lowest = ~0u;
#pragma unroll
  for (int i = 31; i >= 0; --i) {
    if (tile.x[i] == high) lowest = static_cast<unsigned>(LaneTile::element_of(i));
  }
  lowest = __reduce_min_sync(kAllLanes, lowest);
  return static_cast<int64_t>(first) * kTile +
         (lowest == ~0u ? 0 : lowest);  // none: statistics of another row
}

// Mass of one tile in a row's law.
__device__ inline uint64_t mass_of_stats(const TileStats& tile, const RowLaw& law) {
  if (law.kind == LawKind::probs) return mass_of_tile(tile.sum, law.scale);
  if (tile.max < law.cut) return 0;
  return mass_of_tile(tile.sum, weight_of_logit(tile.max, law.max, law.scale, law.cut));
}

// body(statistics of a tile) for this lane's tiles of a row, four of them on their way at a time.
template <class Body>
__device__ __forceinline__ void for_stats(const TileStats* stats, int64_t tiles, Body body) {
#pragma unroll 1
  for (int64_t first = lane_id(); first < tiles; first += 4 * kWarpSize) {
    TileStats found[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t index = first + i * kWarpSize;
      found[i] = index < tiles ? read_stats(stats + index) : TileStats{-infinity(), 0.0f};
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i * kWarpSize < tiles) body(found[i]);
    }
  }
}

inline __device__ __noinline__ uint64_t mass_of_row(const TileStats* stats, int64_t tiles,
                                                    const RowLaw& law) {
  const RowLaw of_row = law;
  uint64_t mass = 0;
  for_stats(stats, tiles, [&](const TileStats& tile) { mass += mass_of_stats(tile, of_row); });
  return sum_of_masses(mass);
}

struct RowExtremes {
  float max;
  bool regular;
};

inline __device__ __noinline__ RowExtremes extremes_of(const TileStats* stats, int64_t tiles, LawKind kind) {
  float high = -infinity();
  bool regular = true;
  for_stats(stats, tiles, [&](const TileStats& tile) {
    high = fmaxf(high, tile.max);
    regular = regular && tile.sum <= static_cast<float>(kTile + 1) &&
              (kind == LawKind::point || tile.max < infinity());
  });
  return {max_of_warp(high), __all_sync(kAllLanes, regular) != 0};
}

// Of a row without filters. The same in every lane.
inline __device__ __noinline__ RowLaw law_of_stats(const RowTask& task) {
  const int64_t tiles = tiles_of(task.row.size);
  const RowExtremes found = extremes_of(task.stats, tiles, task.reading.kind);
  RowLaw law;
  law.kind = task.reading.kind;
  if (law.kind == LawKind::point) {
    law.top = lowest_of(task.row, task.stats, found.max);
    law.usable = found.regular && found.max > -infinity();
    return law;
  }
  law.max = found.max;
  law.usable = found.regular && found.max > -infinity();
  if (law.kind == LawKind::logits) {
    law.scale = task.reading.scale;
    law.cut = task.reading.floor_below(law.max);
  } else {
    law.cut = kLeastProb;
    law.usable = law.usable && law.max > 0x1p-24f && law.max < 2.0f;
    law.scale = 1.0f / law.max;
  }
  if (law.usable) law.mass = mass_of_row(task.stats, tiles, law);
  if (law.usable && law.kind == LawKind::probs) {
    const double total = static_cast<double>(law.mass) / kMassUnit * static_cast<double>(law.max);
    law.usable = total > 0.98 && total < 1.02;
  }
  if (law.usable) return law;
  RowLaw none;
  none.usable = false;
  none.top = law.kind == LawKind::logits ? lowest_of(task.row, task.stats, found.max) : -1;
  return none;
}

// log of a token's probability under the law, its element given; -infinity if it has none.
__device__ inline float log_probability(const RowLaw& law, int64_t token, float element) {
  if (law.kind == LawKind::point) return token == law.top ? 0.0f : -infinity();
  if (!(element >= law.cut)) return -infinity();
  // Not the log of a weight: the exponent is known exactly, so nothing is lost far below the top.
  const double exponent =
      (static_cast<double>(element) - static_cast<double>(law.max)) * static_cast<double>(law.scale) * kLn2;
  return static_cast<float>(exponent - log_positive(static_cast<double>(law.mass) / kMassUnit));
}

}  // namespace foretoken::cuda

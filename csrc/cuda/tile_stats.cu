#include "cuda/tile_stats.hpp"

#include <algorithm>

#include "cuda/errors.hpp"
#include "cuda/tile_stream.cuh"
#include "cuda/views.cuh"

namespace foretoken::cuda {

namespace {

constexpr int kTileWarps = 8;  // of a block

// A warp for each tile, one after the other.
template <DType kType>
__global__ void __launch_bounds__(kTileWarps* kWarpSize)
    tile_stats_kernel(const __grid_constant__ TileStatsArgs args, int64_t items) {
  const int rank = args.logits.rank;
  const int64_t vocab = args.logits.shape[rank - 1], tiles = tiles_of(vocab);
  const int64_t nodes = rank == 3 ? args.logits.shape[1] : 1;
  TileStats* const out = static_cast<TileStats*>(args.out.data);
  const int64_t workers = int64_t{gridDim.x} * kTileWarps;
  for (int64_t item = int64_t{blockIdx.x} * kTileWarps + threadIdx.x / kWarpSize; item < items;
       item += workers) {
    const int64_t row = item / tiles, index = item % tiles, b = row / nodes;
    const int64_t slot = slot_of(args.slots, b, args.sampling.size);
    TileStats found{-infinity(), infinity()};
    if (slot >= 0) {
      const RowReading reading = RowReading::of_logits(args.sampling.temperature[slot]);
      const int64_t offset = rank == 3 ? offset_of(args.logits, b, row % nodes) : offset_of(args.logits, b);
      const DeviceRow data{static_cast<const char*>(args.logits.data) + offset * RawTile<kType>::kBytes,
                           kType, vocab};
      RawTile<kType> raw;
      raw.load(data, index, minus_infinity_bits<kType>());
      float lane_max;
      found = stats_of_tile(raw, reading, lane_max);
      if (!is_regular(found.max, found.sum, reading.kind == LawKind::point)) found.sum = infinity();
    }
    if (lane_id() == 0) out[item] = found;
  }
}

template <DType kType>
void launch(const TileStatsArgs& args, int64_t items, Stream stream) {
  constexpr int64_t kMostBlocks = 132 * 8;  // more would only be dealt out again
  const unsigned blocks = static_cast<unsigned>(std::min((items + kTileWarps - 1) / kTileWarps, kMostBlocks));
  tile_stats_kernel<kType>
      <<<blocks, kTileWarps * kWarpSize, 0, static_cast<cudaStream_t>(stream.handle)>>>(args, items);
  throw_if_failed(cudaGetLastError(), "tile_stats");
}

}  // namespace

void tile_stats(const TileStatsArgs& args, Stream stream) {
  const int rank = args.logits.rank;
  int64_t items = (args.logits.shape[rank - 1] + kTile - 1) / kTile;
  for (int dim = 0; dim + 1 < rank; ++dim) items *= args.logits.shape[dim];
  if (items == 0) return;
  switch (args.logits.dtype) {
    case DType::float32: return launch<DType::float32>(args, items, stream);
    case DType::bfloat16: return launch<DType::bfloat16>(args, items, stream);
    default: return launch<DType::float16>(args, items, stream);
  }
}

}  // namespace foretoken::cuda

#include "cpu/tile_stats.hpp"

#include <limits>

#include "cpu/parallel.hpp"
#include "cpu/rows.hpp"
#include "cpu/views.hpp"

namespace foretoken::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TileStats stats_of(const RowKernels& kernels, TileRef tile, bool greedy, float scale) {
  if (!greedy) {
    LogitsTile found;
    kernels.summarise_logits(tile, 1, scale, &found);
    if (found.regular) return {found.max, found.sum};
  }
  const TileMax most = kernels.max_of(tile);
  return {most.max, greedy && !most.has_nan ? 0.0f : kInfinity};
}

}  // namespace

void tile_stats(const TileStatsArgs& args) {
  const int rank = args.logits.rank;
  const int64_t vocab = args.logits.shape[rank - 1], tiles = tiles_of(vocab);
  const int64_t nodes = rank == 3 ? args.logits.shape[1] : 1;
  TileStats* const out = static_cast<TileStats*>(args.out.data);
  parallel_for(args.logits.shape[0] * nodes, vocab, [&](int64_t item) {
    const int64_t b = item / nodes, slot = slot_of(args.slots, b, args.sampling.size);
    TileStats* const row_out = out + item * tiles;
    if (slot < 0) {
      for (int64_t index = 0; index < tiles; ++index) row_out[index] = {-kInfinity, kInfinity};
      return;
    }
    const float temperature = args.sampling.temperature[slot];
    const bool greedy = temperature == 0.0f;
    const float scale = greedy ? 0.0f : logits_scale(temperature);
    const int64_t offset = rank == 3 ? offset_of(args.logits, b, item % nodes) : offset_of(args.logits, b);
    const Row row = row_at(args.logits, offset);
    const RowKernels& kernels = row_kernels();
    Tile tile;
    for (int64_t index = 0; index < tiles; ++index) {
      row_out[index] = stats_of(kernels, tile.ref(kernels, row, index, -kInfinity), greedy, scale);
    }
  });
}

}  // namespace foretoken::cpu

#pragma once

#include "ops/tile_stats.hpp"

namespace foretoken::cuda {

// One launch, without scratch.
void tile_stats(const TileStatsArgs& args, Stream stream);

}  // namespace foretoken::cuda

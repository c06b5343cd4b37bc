#pragma once

#include "ops/tile_stats.hpp"

namespace foretoken::cpu {

void tile_stats(const TileStatsArgs& args);

}  // namespace foretoken::cpu

// Top-k, top-p and min-p as one threshold on the logits, found without sorting the row.
#pragma once

#include "cpu/rows.hpp"

namespace foretoken::cpu {

// What the first pass over a row leaves behind for the later ones.
struct RowSummary {
  LogitsTile tiles[kMaxTiles];
};

bool filters_on(const Processing& processing, int64_t vocab);

// Smallest logit that every active filter keeps. `law` has max and scale; its cut and mass are not read.
float filter_cut(const Row& row, const RowLaw& law, const Processing& processing, const RowSummary& summary);

}  // namespace foretoken::cpu

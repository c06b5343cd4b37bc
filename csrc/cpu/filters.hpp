// Top-k, top-p and min-p as one threshold on the logits, found without sorting the row.
#pragma once

#include "cpu/rows.hpp"

namespace foretoken::cpu {

// What the first pass over a row leaves behind for the later ones.
struct RowSummary {
  LogitsTile tiles[kMaxTiles];
  // Where a filter has looked at single elements: those of tile i that it may have kept, and perhaps some
  // more, are kept[first[i]] up to kept[first[i + 1]]. Null where none has; gone with the next row.
  const float* kept = nullptr;
  int32_t first[kMaxTiles + 1];
};

// The first pass over a row: what each tile holds, relative to its own largest element, and law.max. False if
// the row has no law. Of the law, scale is read.
bool summarise(const Row& row, RowLaw& law, RowSummary& summary);

bool filters_on(const Processing& processing, int64_t vocab);

// Smallest logit that every active filter keeps. `law` has max and scale; its cut and mass are not read.
float filter_cut(const Row& row, const RowLaw& law, const Processing& processing, RowSummary& summary);

}  // namespace foretoken::cpu

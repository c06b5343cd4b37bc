// The token that position-keyed Gumbel noise picks from a row.
#pragma once

#include "cpu/rows.hpp"

namespace foretoken::cpu {

// `position`: absolute index of the token to be emitted. `vocab_map` (or null): the target id of each
// element, by which the noise goes, so that a drafter of another vocabulary shares it; elements that map to
// none must be masked. Returns the element.
int64_t gumbel_draw(const Row& row, const RowLaw& law, uint64_t seed, uint64_t position,
                    const TensorView& vocab_map);

}  // namespace foretoken::cpu

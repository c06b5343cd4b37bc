// The token that position-keyed Gumbel noise picks from a row.
#pragma once

#include "cpu/rows.hpp"

namespace foretoken::cpu {

// `position`: absolute index of the token to be emitted.
int64_t gumbel_draw(const Row& row, const RowLaw& law, uint64_t seed, uint64_t position);

}  // namespace foretoken::cpu

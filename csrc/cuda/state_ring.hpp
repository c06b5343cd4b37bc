#pragma once

#include "ops/state_ring.hpp"

namespace foretoken::cuda {

void reserve_states(const StateRingArgs& args, Stream stream);
void commit_states(const StateRingArgs& args, Stream stream);

}  // namespace foretoken::cuda

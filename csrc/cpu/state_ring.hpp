#pragma once

#include "ops/state_ring.hpp"

namespace foretoken::cpu {

void reserve_states(const StateRingArgs& args);
void commit_states(const StateRingArgs& args);

}  // namespace foretoken::cpu

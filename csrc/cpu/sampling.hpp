#pragma once

#include "ops/sampling.hpp"

namespace foretoken::cpu {

void sample(const SampleArgs& args);

}  // namespace foretoken::cpu

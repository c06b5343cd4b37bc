#pragma once

#include "ops/sampling.hpp"

namespace foretoken::cuda {

void sample(const SampleArgs& args, Device device, Stream stream);

}  // namespace foretoken::cuda

// Contract of the self check: the shared arithmetic evaluated on a device, to be compared with the host's.
#pragma once

#include <cstdint>

#include "math/selfcheck.hpp"

namespace foretoken::cuda {

// inputs, outputs: host arrays of `count` elements. Synchronous; throws std::runtime_error on any CUDA error.
void self_check(const SelfCheckInput* inputs, SelfCheckOutput* outputs, int64_t count);

}  // namespace foretoken::cuda

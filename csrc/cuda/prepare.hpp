#pragma once

#include "ops/prepare.hpp"

namespace foretoken::cuda {

// One launch; with a vocab_map two, and three (behind a memset) where constraints meet one. No
// synchronisation, no read by the host: can be captured. `workspace`: what.bytes, aligned to 16.
PreparedRows prepare(const VerifyArgs& args, const Preparation& what, void* workspace, Device device,
                     Stream stream);
PreparedRows prepare(const SampleArgs& args, const Preparation& what, void* workspace, Device device,
                     Stream stream);

}  // namespace foretoken::cuda

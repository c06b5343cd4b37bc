#pragma once

#include "ops/sampling.hpp"

namespace foretoken::cuda {

// Bytes of scratch that a call needs, of any contents; 0 unless something edits the rows.
int64_t sample_workspace(const SampleArgs& args);

void sample(const SampleArgs& args, void* workspace, Device device, Stream stream);

}  // namespace foretoken::cuda

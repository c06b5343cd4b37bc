// Verification on CUDA: one launch a call, its scratch from the caller.
#pragma once

#include "ops/verify.hpp"

namespace foretoken::cuda {

// Bytes of scratch that a call needs; all zero before its first use, and left fit for the next.
int64_t verify_workspace(const VerifyArgs& args, Device device);

void verify(const VerifyArgs& args, void* workspace, Device device, Stream stream);

}  // namespace foretoken::cuda

#pragma once

#include "ops/commit.hpp"

namespace foretoken::cuda {

void commit(const CommitArgs& args, Device device, Stream stream);

}  // namespace foretoken::cuda

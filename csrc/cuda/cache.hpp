#pragma once

#include "ops/cache.hpp"

namespace foretoken::cuda {

void append(const AppendArgs& args, Device device, Stream stream);
void compact(const CompactArgs& args, Device device, Stream stream);

}  // namespace foretoken::cuda

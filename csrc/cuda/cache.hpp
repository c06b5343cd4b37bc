#pragma once

#include "ops/cache.hpp"

namespace foretoken::cuda {

void append(const AppendArgs& args, Stream stream);
void compact(const CompactArgs& args, Stream stream);

}  // namespace foretoken::cuda

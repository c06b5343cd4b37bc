#pragma once

#include "ops/tree.hpp"

namespace foretoken::cuda {

// One launch, without scratch.
void tree_index(const TreeIndexArgs& args, Stream stream);

}  // namespace foretoken::cuda

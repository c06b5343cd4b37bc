#pragma once

#include "ops/tree.hpp"

namespace foretoken::cpu {

void tree_index(const TreeIndexArgs& args);

}  // namespace foretoken::cpu

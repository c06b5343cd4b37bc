#pragma once

#include "ops/tree.hpp"

namespace foretoken::cpu {

void tree_index(const TreeIndexArgs& args);
void index_row(const TreeIndexArgs& args, int64_t b);  // row b of it

}  // namespace foretoken::cpu

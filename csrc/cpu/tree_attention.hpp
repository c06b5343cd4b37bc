#pragma once

#include "ops/tree_attention.hpp"

namespace foretoken::cpu {

void tree_attention(const TreeAttentionArgs& args);
void merge(const MergeArgs& args);

}  // namespace foretoken::cpu

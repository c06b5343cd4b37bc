#pragma once

#include "ops/draft_tree.hpp"

namespace foretoken::cpu {

void draft_topk(const DraftTopkArgs& args);
void finalize_tree(const FinalizeTreeArgs& args);

}  // namespace foretoken::cpu

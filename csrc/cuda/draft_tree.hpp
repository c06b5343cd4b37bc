#pragma once

#include "ops/draft_tree.hpp"

namespace foretoken::cuda {

void draft_topk(const DraftTopkArgs& args, Device device, Stream stream);
void finalize_tree(const FinalizeTreeArgs& args, Stream stream);

}  // namespace foretoken::cuda

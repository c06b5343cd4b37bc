// Tree attention on CUDA: declarations.
#pragma once

#include "ops/tree_attention.hpp"

namespace foretoken::cuda {

// Bytes of scratch that calls one behind the other on a stream may share, whatever their shapes; the first
// kAttentionCounterBytes of them zero before the first use. From shapes alone.
int64_t tree_attention_workspace(const TreeAttentionArgs& args, Device device);
void tree_attention(const TreeAttentionArgs& args, void* workspace, Device device, Stream stream);
void merge(const MergeArgs& args, Stream stream);

}  // namespace foretoken::cuda

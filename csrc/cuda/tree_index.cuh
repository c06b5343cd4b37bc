// Draft trees by a warp.
#pragma once

#include "cuda/tile.cuh"
#include "math/tree_index.hpp"

namespace foretoken::cuda {

// build_tree() of math/tree_index.hpp by a warp, from parents in shared memory; false if one is not a smaller
// node.
__device__ inline bool build_tree_by_warp(TreeIndex& tree, int32_t nodes, const int16_t* parents) {
  if (lane_id() == 0) {
    tree.nodes = nodes;
    tree.parent[0] = kNoNode;
    tree.depth[0] = 0;
  }
  bool usable = true;
  for (int32_t node = lane_id(); node < nodes; node += kWarpSize) {
    tree.first_child[node] = tree.next_sibling[node] = kNoNode;
    if (node == 0) continue;
    tree.parent[node] = parents[node];
    usable = usable && parents[node] >= 0;
  }
  if (!__all_sync(kAllLanes, usable)) return false;
  __syncwarp();
  for (int32_t first = 0; first < nodes; first += kWarpSize) {
    const int32_t node = first + lane_id();
    int32_t depth = 0, at = node;
    for (; node < nodes && at > 0 && at >= first; at = parents[at]) ++depth;
    if (node > 0 && node < nodes) tree.depth[node] = static_cast<int16_t>(depth + tree.depth[at]);
    __syncwarp();
  }
  // From the last nodes to the first: what a parent has so far are the younger siblings.
  for (int32_t first = (nodes - 1) / kWarpSize * kWarpSize; first >= 0; first -= kWarpSize) {
    const int32_t node = first + lane_id();
    const bool there = node > 0 && node < nodes;
    const int32_t parent = there ? parents[node] : kNoNode - 1 - lane_id();
    const unsigned siblings = __match_any_sync(kAllLanes, parent);
    const unsigned younger = siblings & ~((2u << lane_id()) - 1);
    if (there) {
      tree.next_sibling[node] = younger != 0
                                    ? static_cast<int16_t>(first + __ffs(static_cast<int>(younger)) - 1)
                                    : tree.first_child[parent];
    }
    __syncwarp();
    if (there && (siblings & ((1u << lane_id()) - 1)) == 0)
      tree.first_child[parent] = static_cast<int16_t>(node);
    __syncwarp();
  }
  return true;
}

}  // namespace foretoken::cuda

// One warp a row: 32 nodes at a time, so that what is known of earlier ones spares walking to the root.
#include "cuda/tree.hpp"

#include "cuda/errors.hpp"
#include "cuda/tree_index.cuh"
#include "cuda/views.cuh"

namespace foretoken::cuda {

namespace {

constexpr int kWords = static_cast<int>(words_of(kMaxNodes));

struct TreeScratch {
  TreeIndex tree;
  int16_t parents[kMaxNodes];
  uint64_t ancestors[kMaxNodes][kWords];
};

// Number of the row's nodes, their tree in `scratch`; -1 if its count or a parent is unusable.
__device__ int32_t build_row(const TreeIndexArgs& args, int64_t b, TreeScratch& scratch) {
  const int64_t most = args.parents.shape[1];
  const int64_t drafts = args.num_drafts ? read_index(args.num_drafts, b) : most;
  if (drafts == -1) return 0;
  if (drafts < 0 || drafts > most) return -1;
  const int32_t nodes = static_cast<int32_t>(drafts) + 1;
  for (int32_t node = 1 + lane_id(); node < nodes; node += kWarpSize) {
    const int64_t parent = read_index(args.parents, b, node - 1);
    scratch.parents[node] = parent >= 0 && parent < node ? static_cast<int16_t>(parent) : kNoNode;
  }
  __syncwarp();
  return build_tree_by_warp(scratch.tree, nodes, scratch.parents) ? nodes : -1;
}

// Of 32 nodes, behind those of all nodes before them.
__device__ void find_ancestors(TreeScratch& scratch, int32_t first, int32_t nodes) {
  const int32_t node = first + lane_id();
  if (node < nodes) {
    uint64_t own = 0;
    int32_t at = node;
    for (; at >= first; at = scratch.tree.parent[at]) own |= uint64_t{1} << (at % 64);
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const uint64_t before = at >= 0 ? scratch.ancestors[at][word] : 0;
      scratch.ancestors[node][word] = word == first / 64 ? before | own : before;
    }
  }
  __syncwarp();
}

__global__ void __launch_bounds__(kWarpSize) tree_index_kernel(const __grid_constant__ TreeIndexArgs args) {
  __shared__ __align__(16) unsigned char memory[sizeof(TreeScratch)];
  TreeScratch& scratch = *reinterpret_cast<TreeScratch*>(memory);
  const int64_t b = blockIdx.x;
  int32_t nodes = build_row(args, b, scratch);
  const bool bad = nodes < 0;
  if (bad) {
    __syncwarp();
    build_tree_by_warp(scratch.tree, 1, scratch.parents);
    nodes = 1;
  }
  for (int32_t first = 0; first < nodes; first += kWarpSize) find_ancestors(scratch, first, nodes);
  const uint64_t length = args.lengths ? static_cast<uint64_t>(read_index(args.lengths, b)) : 0;
  for (int64_t node = lane_id(); node < args.depth.shape[1]; node += kWarpSize) {
    const bool there = node < nodes;
    const int32_t depth = there ? scratch.tree.depth[node] : -1;
    write_index(args.depth, depth, b, node);
    write_index(args.first_child, there ? scratch.tree.first_child[node] : kNoNode, b, node);
    write_index(args.next_sibling, there ? scratch.tree.next_sibling[node] : kNoNode, b, node);
    for (int64_t word = 0; word < args.ancestors.shape[2]; ++word) {
      const uint64_t bits = there ? scratch.ancestors[node][word] : 0;
      write_index(args.ancestors, static_cast<int64_t>(bits), b, node, word);
    }
    if (!args.positions) continue;
    const uint64_t position = there ? length + static_cast<uint64_t>(depth) : 0;
    write_index(args.positions, static_cast<int64_t>(position), b, node);
  }
  if (lane_id() == 0) write_index(args.status, bad ? kBadDraft : 0, b);
}

}  // namespace

void tree_index(const TreeIndexArgs& args, Stream stream) {
  const int64_t rows = args.depth.shape[0];
  if (rows == 0) return;
  tree_index_kernel<<<static_cast<unsigned>(rows), kWarpSize, 0, static_cast<cudaStream_t>(stream.handle)>>>(
      args);
  throw_if_failed(cudaGetLastError(), "tree_index");
}

}  // namespace foretoken::cuda

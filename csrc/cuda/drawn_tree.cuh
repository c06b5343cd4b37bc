// Trees whose drafts were drawn, on the ground of the kernel for chains: what a block keeps of one, and what
// is known of its nodes before any law is.
#pragma once

#include "cuda/chain_shared.cuh"
#include "cuda/tree_index.cuh"
#include "math/tree_walk.hpp"

namespace foretoken::cuda {

constexpr int kMostTreeNodes = 128;
static_assert(2 * kMostTreeNodes <= kMostChainRows);

// What is known of the nodes before any law is: the first block's, which all others copy.
struct alignas(16) DrawnNodes {
  TreeIndex index;  // of the root alone, if the proposal cannot be taken
  int32_t usable;
  uint64_t closing_bits[kMostTreeNodes];
  int32_t token[kMostTreeNodes];  // -1: outside the vocabulary
  uint32_t coin[kMostTreeNodes];
  float of_target[kMostTreeNodes], of_draft[kMostTreeNodes];  // of its token in its parent's rows
  int16_t law_row[kMostTreeNodes];  // that its children were drawn from; kNoNode: they are points
  bool suits[kMostTreeNodes];       // what hangs below is verified from the leaves up
};

// A rejected child of `row`, as reject() of math/tree_walk.hpp takes it.
struct Rejection {
  double weight, before;
  int32_t row;  // kNoNode: there is none
  bool wanted;  // what is left is asked for ...
  bool asks;    // ... and takes two rows to tell
  bool leaves;  // a sibling was drawn from what it leaves of the law
  bool fails;   // the coin has already decided against the row's node
};

// The mass of a residual that was added up; those of its tiles are kept for two turns.
struct KnownResidual {
  double gain;
  uint64_t mass;
  int32_t turn, which;
};

struct alignas(16) DrawnTree {
  DrawnNodes nodes;
  NodeState states[kMostTreeNodes];
  double target_prob[kMostTreeNodes], draft_prob[kMostTreeNodes];
  KnownResidual known[kMostTreeNodes];  // the last one of each row
  RemovedToken removed[kMostTreeNodes];
  int16_t next[kMostTreeNodes];  // the child that the climb comes to
  int16_t path[kMostTreeNodes];
  Rejection rejection;
  int32_t top, child;  // siblings are walked here, and this one is next
  int32_t node;        // of the climb; in the end the last one that is kept
  int32_t depth;       // of that
  int32_t num_removed;
  int32_t turn;  // of the last sums; in the end of those that the token is drawn from
  int32_t status;
  bool climbs, closes;
  bool sums;                      // the step's residuals are wanted
  bool reads;                     // the law of the step's node is, whose row was left out at first
  int32_t left_row;               // what rejected children leave of the law of this node is; none: kNoNode
  double left;                    // that share
  bool unsolved[kMostChainRows];  // filtered rows that are left to all blocks
  int32_t num_rows;
  int16_t rows[2 * kMostTreeNodes];  // that are read at first
  bool wanted[2 * kMostTreeNodes];   // rows of the target by node, and of laws, that are looked at
};

constexpr int16_t kBadLawRow = -2;

// Which rows are read at first. `drawn`: those of laws are. `lazily`: those of leaves are not, as only a
// closing token is ever drawn from them. `given`: none of the target's. By a block, a thread for each node.
inline __device__ __noinline__ void plan_rows(const ChainArgs& args, DrawnTree& tree, int64_t b,
                                              int32_t drafts, bool drawn, bool lazily, bool given) {
  const int32_t node = static_cast<int32_t>(threadIdx.x);
  static_assert(kThreads >= 2 * kMostTreeNodes);
  const bool there = node <= drafts;
  int64_t law_row = kNoNode, parent = kNoNode;
  if (there && drawn) law_row = args.draft_rows.data ? read_number(args.draft_rows, b, node) : node;
  if (there && node > 0) parent = args.parents.data ? read_number(args.parents, b, node - 1) : node - 1;
  if (node < 2 * kMostTreeNodes) tree.wanted[node] = node == 0;
  __syncthreads();
  if (parent >= 0 && parent < node) tree.wanted[parent] = true;
  __syncthreads();
  if (there && tree.wanted[node] && law_row >= 0 && law_row < args.law_rows)
    tree.wanted[kMostTreeNodes + law_row] = true;
  __syncthreads();
  if (there && !lazily) tree.wanted[node] = true;
  __syncthreads();
  if (node < kWarpSize) {
    int32_t count = 0;
    for (int32_t first = given ? kMostTreeNodes : 0; first < 2 * kMostTreeNodes; first += kWarpSize) {
      const int32_t at = first + lane_id();
      const unsigned all = __ballot_sync(kAllLanes, tree.wanted[at]);
      const int32_t row = at < kMostTreeNodes ? at : at - kMostTreeNodes + args.most_drafts + 1;
      if (tree.wanted[at])
        tree.rows[count + __popc(all & ((1u << lane_id()) - 1))] = static_cast<int16_t>(row);
      count += __popc(all);
    }
    if (lane_id() == 0) tree.num_rows = count;
  }
  __syncthreads();
}

// find_suiting() of math/tree_index.hpp: a node suits if below it every younger sibling fits into the elder
// one. `drawn`, `any_drawn`: laws are looked at, and there is one.
inline __device__ __noinline__ void find_suiting_by_warp(const ChainArgs& args, bool drawn, bool any_drawn,
                                                         DrawnNodes& tree) {
  const bool mixes = args.rule == Rule::automatic && any_drawn;
  for (int32_t node = lane_id(); node < tree.index.nodes; node += kWarpSize)
    tree.suits[node] = mixes || (args.rule == Rule::traversal && drawn);
  __syncwarp();
  for (int32_t node = 1 + lane_id(); mixes && node < tree.index.nodes; node += kWarpSize) {
    const int32_t younger = tree.index.next_sibling[node];
    if (younger == kNoNode) continue;
    if (!args.without_replacement && fits_into(tree.index, node, younger)) continue;
    for (int32_t at = tree.index.parent[node]; at >= 0; at = tree.index.parent[at]) tree.suits[at] = false;
  }
  __syncwarp();
}

// By one warp, while the others read rows. `drawn`: laws of the drafts' are looked at.
inline __device__ __noinline__ void look_ahead_at_tree(const ChainArgs& args, DrawnNodes& tree, DType type,
                                                       int64_t b, uint64_t seed, int32_t drafts, bool usable,
                                                       bool drawn) {
  const uint64_t base = static_cast<uint64_t>(read_number(args.base, b));
  for (int32_t node = lane_id(); node <= drafts; node += kWarpSize) {
    const int64_t row = args.draft_rows.data ? read_number(args.draft_rows, b, node) : node;
    tree.law_row[node] = !drawn || row == -1               ? kNoNode
                         : row >= 0 && row < args.law_rows ? static_cast<int16_t>(row)
                                                           : kBadLawRow;
    int64_t token = -1, parent = kNoNode;
    if (node > 0) {
      token = read_number(args.draft_tokens, b, node - 1);
      parent = args.parents.data ? read_number(args.parents, b, node - 1) : int64_t{node} - 1;
    }
    tree.token[node] = token >= 0 && token < args.vocab ? static_cast<int32_t>(token) : -1;
    tree.index.parent[node] = static_cast<int16_t>(parent >= 0 && parent < node ? parent : kNoNode);
    tree.coin[node] = random_coin(seed, base, static_cast<uint32_t>(node));
    tree.closing_bits[node] = random_bits(seed, base, Purpose::close, static_cast<uint32_t>(node));
  }
  __syncwarp();
  const int64_t bytes = bytes_of(type);
  const auto element = [&](const ChainRowsView& view, int64_t row, int32_t token) {
    const int64_t at = b * view.strides[0] + row * view.strides[1];
    return element_at({static_cast<const char*>(view.data) + at * bytes, type, args.vocab}, token);
  };
  usable = usable && build_tree_by_warp(tree.index, drafts + 1, tree.index.parent);
  for (int32_t node = 1 + lane_id(); usable && node <= drafts; node += kWarpSize) {
    const int32_t parent = tree.index.parent[node], token = tree.token[node];
    usable = token >= 0 && tree.index.depth[node] < args.most_tokens && tree.law_row[parent] != kBadLawRow;
    if (!usable) break;
    tree.of_target[node] = element(args.target, parent, token);
    tree.of_draft[node] = tree.law_row[parent] >= 0 ? element(args.draft, tree.law_row[parent], token) : 0.0f;
  }
  usable = __all_sync(kAllLanes, usable) != 0;
  if (!usable) build_tree_by_warp(tree.index, 1, tree.index.parent);
  __syncwarp();
  bool any_drawn = false;
  for (int32_t node = lane_id(); node < tree.index.nodes; node += kWarpSize) {
    any_drawn = any_drawn || (tree.index.first_child[node] != kNoNode && tree.law_row[node] >= 0);
  }
  any_drawn = __any_sync(kAllLanes, any_drawn) != 0;
  if (lane_id() == 0) tree.usable = usable ? 1 : 0;
  find_suiting_by_warp(args, drawn, any_drawn, tree);
}

}  // namespace foretoken::cuda

// Which slots the nodes of a row see, and where these lie.
#pragma once

#include "ops/tree_attention.hpp"

namespace foretoken::cpu {

struct NodeSight {
  uint64_t words[kMaxNodes / 64];  // bits below the row's number of nodes
  int64_t depth;
};

struct RowPlan {
  int64_t b = 0, length = 0, nodes = 0;
  int64_t first = 0;    // the first slot that a node sees
  bool usable = false;  // else all its nodes are NaN

  int64_t end() const { return length + nodes; }
};

RowPlan plan_row(const TreeAttentionArgs& args, int64_t b);

// All nodes of a row.
void read_nodes(const TreeAttentionArgs& args, const RowPlan& row, NodeSight* nodes);

// Columns [from, columns) of the chunk that begins at slot `begin`, as node r sees them: all ones or zero.
void write_seen(const TreeAttentionArgs& args, const RowPlan& row, const NodeSight* nodes, int64_t r,
                int64_t begin, int64_t from, int64_t columns, uint32_t* seen);

// Where slots [first, last) of a row lie, for one kv head.
void locate(const TreeAttentionArgs& args, const TensorView& cache, const RowPlan& row, int64_t kv_head,
            int64_t first, int64_t last, const void** places);

}  // namespace foretoken::cpu

// Contract of the tree index: parents as people write them, turned into what kernels walk.
#pragma once

#include "ops/sampling.hpp"

namespace foretoken {

struct TreeIndexArgs {      // B rows, N draft nodes, T = N + 1, W = ceil(T / 64)
  TensorView parents;       // [B, N] int32 | int64: entry i is the parent of node i + 1, a node number <= i
  TensorView num_drafts;    // [B] int32; null: N. 0: the root alone. -1: a padded row, without any node
  TensorView lengths;       // [B] int64 position of the root; null with `positions`
  TensorView depth;         // [B, T] int32 out; -1 behind the row's nodes
  TensorView first_child;   // [B, T] int32 out; kNoNode: none
  TensorView next_sibling;  // [B, T] int32 out, ascending node number; kNoNode: none
  TensorView ancestors;     // [B, T, W] int64 out; 0 behind the row's nodes
  TensorView positions;     // [B, T] int64 out, may be null: lengths + depth; 0 behind the row's nodes
  TensorView status;        // [B] int32 out: kBadDraft where the tree was replaced by its root
};

}  // namespace foretoken

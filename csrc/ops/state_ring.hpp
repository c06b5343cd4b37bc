// Contract of a ring of recurrent states: which of a slot's R entries is the committed one, and where the
// nodes of a round read and write theirs. States themselves are never touched here.
#pragma once

#include "ops/tensor_view.hpp"

namespace foretoken {

constexpr int64_t kMostRingEntries = 257;  // of rounds of 256 nodes

struct StateRingArgs {  // S slots of R entries; B rows of up to T = N + 1 <= R - 1 nodes
  TensorView current;   // [S] int32 in, out: the entry with the committed state
  TensorView reserved;  // [S] int32 in, out: nodes of the round under way, 0 outside of one
  TensorView slots;     // [B] int32 | int64, no slot twice; null: row b is slot b
  TensorView status;    // [B] int32 out: kBadRow where nothing was read or changed
  int64_t entries = 0;  // R
  // A round begins: node t takes entry (current + 1 + t) mod R.
  TensorView parents;    // [B, N] int32 | int64: of node t + 1, a number up to t; null: a chain
  TensorView num_nodes;  // [B] int32 | int64, T at most, none if negative; null: T
  TensorView read;   // [B, T] int32 | int64 out: slot * R + entry of the parent's state, -1 behind num_nodes
  TensorView write;  // [B, T] int32 | int64 out: the same of the node's own
  // And ends: the last accepted node's entry becomes the current one.
  TensorView path;          // [B, D] int32 | int64: numbers of the accepted nodes; null: of a chain
  TensorView num_accepted;  // [B] int32 | int64
};

FORETOKEN_HD inline int64_t ring_entry(int64_t current, int64_t node, int64_t entries) {
  const int64_t entry = current + 1 + node;  // both are less than `entries`
  return entry < entries ? entry : entry - entries;
}

// Among the entries of all slots: where a node finds its parent's state, and where its own goes.
struct NodeEntries {
  int64_t from = -1, to = -1;
};
FORETOKEN_HD inline NodeEntries entries_of(int64_t slot, int64_t current, int64_t node, int64_t parent,
                                           int64_t entries) {
  const int64_t first = slot * entries;
  return {first + (node == 0 ? current : ring_entry(current, parent, entries)),
          first + ring_entry(current, node, entries)};
}

}  // namespace foretoken

// A draft tree as arrays of node numbers. Node 0 is the root, nodes 1 .. N are drafts, and a parent is
// always smaller than its children: one forward pass visits parents first, one backward pass children first.
#pragma once

#include "math/portability.hpp"

namespace foretoken {

constexpr int32_t kMaxNodes = 256;  // with the root
constexpr int32_t kMaxDrafts = kMaxNodes - 1;
constexpr int32_t kNoNode = -1;

FORETOKEN_HD constexpr int64_t words_of(int64_t nodes) { return (nodes + 63) / 64; }  // of ancestor bits

struct TreeIndex {
  int32_t nodes = 1;  // with the root
  int16_t parent[kMaxNodes];
  int16_t first_child[kMaxNodes];
  int16_t next_sibling[kMaxNodes];  // ascending node number: the order in which siblings were drawn
  int16_t depth[kMaxNodes];
};

// parent_of(i), for i in 1 .. nodes - 1, gives the parent of node i. False if one is not a smaller node.
template <class ParentOf>
FORETOKEN_HD inline bool build_tree(TreeIndex& tree, int32_t nodes, ParentOf parent_of) {
  tree.nodes = nodes;
  tree.parent[0] = kNoNode;
  tree.depth[0] = 0;
  for (int32_t node = 0; node < nodes; ++node) tree.first_child[node] = tree.next_sibling[node] = kNoNode;
  for (int32_t node = 1; node < nodes; ++node) {
    const int64_t parent = parent_of(node);
    if (parent < 0 || parent >= node) return false;
    tree.parent[node] = static_cast<int16_t>(parent);
    tree.depth[node] = static_cast<int16_t>(tree.depth[parent] + 1);
  }
  for (int32_t node = nodes - 1; node >= 1; --node) {  // backwards, so that each list comes out ascending
    const int32_t parent = tree.parent[node];
    tree.next_sibling[node] = tree.first_child[parent];
    tree.first_child[parent] = static_cast<int16_t>(node);
  }
  return true;
}

// Word w of a node's ancestors: bit j of word j / 64 is set iff j is the node or an ancestor of it.
FORETOKEN_HD inline uint64_t ancestor_word(const TreeIndex& tree, int32_t node, int32_t word) {
  uint64_t bits = 0;
  for (int32_t at = node; at >= 0; at = tree.parent[at]) {
    if (at / 64 == word) bits |= uint64_t{1} << (at % 64);
  }
  return bits;
}

FORETOKEN_HD inline int32_t children_of(const TreeIndex& tree, int32_t node) {
  int32_t count = 0;
  for (int32_t child = tree.first_child[node]; child != kNoNode; child = tree.next_sibling[child]) ++count;
  return count;
}

FORETOKEN_HD inline bool has_even_leaves(const TreeIndex& tree) {
  int32_t deepest = 0;
  for (int32_t node = 0; node < tree.nodes; ++node) {
    if (tree.depth[node] > deepest) deepest = tree.depth[node];
  }
  for (int32_t node = 0; node < tree.nodes; ++node) {
    if (tree.first_child[node] == kNoNode && tree.depth[node] != deepest) return false;
  }
  return true;
}

// Whether the tree below `younger` is what remains of that below `elder` when last siblings are cut off, here
// and there. Both are walked side by side, without a stack.
FORETOKEN_HD inline bool fits_into(const TreeIndex& tree, int32_t elder, int32_t younger) {
  int32_t a = elder, b = younger;
  while (true) {
    if (tree.first_child[b] != kNoNode) {
      a = tree.first_child[a];
      b = tree.first_child[b];
    } else {
      while (b != younger && tree.next_sibling[b] == kNoNode) {
        a = tree.parent[a];
        b = tree.parent[b];
      }
      if (b == younger) return true;
      a = tree.next_sibling[a];
      b = tree.next_sibling[b];
    }
    if (a == kNoNode) return false;
  }
}

// suits[n]: verifying what hangs below node n from the leaves up accepts no less than recursive rejection
// would, for every pair of laws. Independent siblings: each has to fit into the one before it (proven in
// docs/rules/expected-length.md). Without replacement: no node may have two children (smaller losses are
// known for every other shape).
FORETOKEN_HD inline void find_suiting(const TreeIndex& tree, bool without_replacement, bool* suits) {
  for (int32_t node = tree.nodes - 1; node >= 0; --node) {
    suits[node] = true;
    for (int32_t child = tree.first_child[node]; child != kNoNode; child = tree.next_sibling[child]) {
      const int32_t younger = tree.next_sibling[child];
      const bool fits = younger == kNoNode || (!without_replacement && fits_into(tree, child, younger));
      suits[node] = suits[node] && suits[child] && fits;
    }
  }
}

// Leaves `path` (as path_to gives it) as the only children there are.
FORETOKEN_HD inline void keep_path(TreeIndex& tree, const int16_t* path, int32_t depth) {
  int32_t node = 0;
  for (int32_t i = 0; i < depth; ++i) {
    tree.first_child[node] = path[i];
    node = path[i];
    tree.next_sibling[node] = kNoNode;
  }
  tree.first_child[node] = kNoNode;
}

// The same word from that of the node's parent, where parents are visited first; the root's parent has 0.
FORETOKEN_HD inline uint64_t with_node(uint64_t parents_word, int32_t node, int32_t word) {
  return node / 64 == word ? parents_word | uint64_t{1} << (node % 64) : parents_word;
}

// Nodes on the way from the root to `node`, the root left out; returns their number, the node's depth.
FORETOKEN_HD inline int32_t path_to(const TreeIndex& tree, int32_t node, int16_t* path) {
  const int32_t depth = tree.depth[node];
  for (int32_t at = node, i = depth; i > 0; at = tree.parent[at]) path[--i] = static_cast<int16_t>(at);
  return depth;
}

}  // namespace foretoken

#include "cpu/tree.hpp"

#include "cpu/parallel.hpp"
#include "cpu/views.hpp"
#include "math/tree_index.hpp"

namespace foretoken::cpu {

namespace {

// Builds row b; false if its count or a parent is unusable. A padded row has no node at all.
bool build_row(const TreeIndexArgs& args, int64_t b, TreeIndex& tree) {
  const int64_t most = args.parents.shape[1];
  const int64_t drafts = args.num_drafts ? read_index(args.num_drafts, b) : most;
  if (drafts == -1) {
    tree.nodes = 0;
    return true;
  }
  if (drafts < 0 || drafts > most) return false;
  return build_tree(tree, static_cast<int32_t>(drafts + 1),
                    [&](int32_t node) { return read_index(args.parents, b, node - 1); });
}

void write_words(const TreeIndexArgs& args, int64_t b, const TreeIndex& tree, int32_t node) {
  auto* words = static_cast<int64_t*>(args.ancestors.data);
  const bool there = node < tree.nodes;
  for (int32_t word = 0; word < static_cast<int32_t>(args.ancestors.shape[2]); ++word) {
    uint64_t bits = 0;
    if (there && node > 0) {
      bits = static_cast<uint64_t>(words[offset_of(args.ancestors, b, tree.parent[node], word)]);
    }
    if (there) bits = with_node(bits, node, word);
    words[offset_of(args.ancestors, b, node, word)] = static_cast<int64_t>(bits);
  }
}

}  // namespace

void index_row(const TreeIndexArgs& args, int64_t b) {
  TreeIndex tree;
  int32_t status = 0;
  if (!build_row(args, b, tree)) {
    build_tree(tree, 1, [](int32_t) { return int64_t{kNoNode}; });
    status = kBadDraft;
  }
  // Unsigned: a length nobody meant wraps around instead of overflowing.
  const uint64_t length = args.lengths ? static_cast<uint64_t>(read_index(args.lengths, b)) : 0;
  for (int32_t node = 0; node < static_cast<int32_t>(args.depth.shape[1]); ++node) {
    const bool there = node < tree.nodes;
    const int32_t depth = there ? tree.depth[node] : -1;
    write_index(args.depth, depth, b, node);
    write_index(args.first_child, there ? tree.first_child[node] : kNoNode, b, node);
    write_index(args.next_sibling, there ? tree.next_sibling[node] : kNoNode, b, node);
    write_words(args, b, tree, node);
    if (!args.positions) continue;
    const uint64_t position = there ? length + static_cast<uint64_t>(depth) : 0;
    write_index(args.positions, static_cast<int64_t>(position), b, node);
  }
  write_index(args.status, status, b);
}

void tree_index(const TreeIndexArgs& args) {
  constexpr int64_t kElementsPerNode = 8;  // a node costs about as much as reading so many logits
  const int64_t nodes = args.depth.shape[1];
  parallel_for(args.depth.shape[0], nodes * kElementsPerNode, [&](int64_t b) { index_row(args, b); });
}

}  // namespace foretoken::cpu

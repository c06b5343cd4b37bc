#include "cpu/attention_plan.hpp"

#include <algorithm>

#include "cpu/views.hpp"

namespace foretoken::cpu {

namespace {

// Bits of word w that belong to the row's nodes.
uint64_t bits_there(int64_t nodes, int64_t word) {
  const int64_t count = nodes - 64 * word;
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

uint64_t chain_word(int64_t r, int64_t word) {
  const int64_t last = r - 64 * word;
  if (last < 0) return 0;
  return last >= 63 ? ~uint64_t{0} : (uint64_t{2} << last) - 1;
}

bool pages_are_there(const TreeAttentionArgs& args, const RowPlan& row) {
  const int64_t size = args.k_cache.shape[1];
  for (int64_t slot = row.first / size * size; slot < row.end(); slot += size) {
    const int64_t page = read_index(args.block_table, row.b, slot / size);
    if (page < 0 || page >= args.k_cache.shape[0]) return false;
  }
  return true;
}

}  // namespace

void read_nodes(const TreeAttentionArgs& args, const RowPlan& row, NodeSight* nodes) {
  for (int64_t r = 0; r < row.nodes; ++r) {
    nodes[r].depth = -1;
    for (int64_t word = 0; 64 * word < row.nodes; ++word) {
      uint64_t bits = args.ancestors ? static_cast<uint64_t>(read_index(args.ancestors, row.b, r, word))
                                     : chain_word(r, word);
      bits &= bits_there(row.nodes, word);
      nodes[r].words[word] = bits;
      nodes[r].depth += __builtin_popcountll(bits);
    }
  }
}

RowPlan plan_row(const TreeAttentionArgs& args, int64_t b) {
  RowPlan row;
  const TensorView& cache = args.k_cache;
  const int64_t slots = args.block_table ? args.block_table.shape[1] * cache.shape[1] : cache.shape[1];
  row.b = b;
  row.length = read_index(args.lengths, b);
  row.nodes = args.num_nodes ? read_index(args.num_nodes, b) : args.q.shape[1];
  row.usable =
      row.nodes >= 0 && row.nodes <= args.q.shape[1] && row.length >= 0 && row.length <= slots - row.nodes;
  if (!row.usable || row.nodes == 0) return row;
  if (args.window > 0) {
    NodeSight nodes[kMaxNodes];
    read_nodes(args, row, nodes);
    int64_t depth = nodes[0].depth;
    for (int64_t r = 1; r < row.nodes; ++r) depth = std::min(depth, nodes[r].depth);
    // Without overflow, however wide the window is.
    const int64_t behind = args.window - 1 - depth;
    row.first = behind < row.length ? row.length - std::max<int64_t>(behind, 0) : 0;
  }
  if (args.block_table) row.usable = pages_are_there(args, row);
  return row;
}

void write_seen(const TreeAttentionArgs& args, const RowPlan& row, const NodeSight* nodes, int64_t r,
                int64_t begin, int64_t from, int64_t columns, uint32_t* seen) {
  const NodeSight& node = nodes[r];
  const int64_t tree = std::min(std::max(row.length - begin, from), columns);  // its first column
  int64_t column = from;
  if (args.window > 0) {
    const int64_t behind = args.window - 1 - node.depth;
    const int64_t first = behind < row.length ? row.length - behind : 0;
    for (; column < std::min(first - begin, tree); ++column) seen[column] = 0;
  }
  for (; column < tree; ++column) seen[column] = ~uint32_t{0};
  for (; column < columns; ++column) {
    const int64_t c = begin + column - row.length;
    const bool near = args.window == 0 || nodes[c].depth > node.depth - args.window;
    seen[column] = near && ((node.words[c / 64] >> (c % 64)) & 1u) != 0 ? ~uint32_t{0} : 0;
  }
}

void locate(const TreeAttentionArgs& args, const TensorView& cache, const RowPlan& row, int64_t kv_head,
            int64_t first, int64_t last, const void** places) {
  const int64_t bytes = bytes_of(cache.dtype), size = cache.shape[1];
  const char* base = static_cast<const char*>(cache.data) + kv_head * cache.strides[2] * bytes;
  for (int64_t slot = first; slot < last;) {
    const int64_t page = args.block_table ? read_index(args.block_table, row.b, slot / size) : row.b;
    const int64_t begin = args.block_table ? slot % size : slot;
    const int64_t count = std::min(size - begin, last - slot);
    const char* place = base + (page * cache.strides[0] + begin * cache.strides[1]) * bytes;
    for (int64_t i = 0; i < count; ++i) *places++ = place + i * cache.strides[1] * bytes;
    slot += count;
  }
}

}  // namespace foretoken::cpu

// What a launch of tree attention is given, and how its blocks share the work.
//
// A row's slots are cut into tiles of 64; 8 tiles are a chunk, 8 chunks a segment. Within a chunk tiles
// follow each other. A segment is folded from its chunks and a row from its segments, in order. That is all
// that a result depends on: who computes which chunks is free, and follows from the lengths on the device.
// All tiles of all (row, kv head) pairs, one pair behind the other, are divided among groups of blocks in
// about equal stretches, cut where chunks begin. The blocks of a group read the same stretch, each for 64 or
// 128 of the queries (a node and a head of the kv head's group make one).
#pragma once

#include <cstdint>

#include "math/portability.hpp"
#include "ops/tensor_view.hpp"

namespace foretoken::cuda::attend {

constexpr int kTile = 64;
constexpr int kChunkTiles = 8;
constexpr int kSegmentChunks = 8;
constexpr int kTeam = 128;  // threads of a warpgroup, which has 64 queries
constexpr int kTeamRows = 64;
constexpr int kWords = 4;     // ancestor words of a node
constexpr int kNoPage = -1;   // nothing is read: zeros
constexpr int kBadPage = -2;  // read as NaN

// Tensors are pointers and strides in elements; those of the caches in units of 16 bytes.
struct Task {
  const void* q;
  int64_t q_row, q_node, q_head;
  const uint4 *k_cache, *v_cache;
  uint32_t k_page, k_slot, k_head, v_page, v_slot, v_head;
  const void* lengths;
  int64_t lengths_row;
  const int32_t* num_nodes;  // null: all
  int64_t num_nodes_row;
  const int64_t* ancestors;  // null: causal
  int64_t ancestors_row, ancestors_node, ancestors_word;
  const int32_t* block_table;  // null: contiguous
  int64_t block_table_row, block_table_entry;
  const float *sinks, *k_scale, *v_scale;          // null: none
  int64_t sinks_head, k_scale_head, v_scale_head;  // stride 0: one for all
  void* out;
  int64_t out_row, out_node, out_head;
  float* lse;  // null: not wanted
  int64_t lse_row, lse_node, lse_head;
  uint32_t* counters;  // two for each (row, kv head, block of a group)
  float* partials;     // partial_slots for each block
  float* totals;       // for each block
  int64_t slots, window;
  int32_t pages;       // rows or pages of the caches
  int32_t page_size;   // slots of a page; contiguous: of a row
  int32_t page_shift;  // its logarithm, -1 if there is none
  int32_t batch, nodes, group, kv_heads, head_size;
  int32_t row_blocks;     // blocks of a group
  int32_t block_queries;  // of a row and kv head
  int32_t groups;
  int32_t ring;           // buffers for tiles of K or V
  int32_t boxes;          // of a tile, where the copy engine brings them; else 0
  int32_t partial_slots;  // the last two for a pair's first stretch
  float scale, softcap;
  bool long_lengths, q_is_bfloat, float8_e5m2, aligned_q, aligned_out;

  // Of a query, below 4096, the node: group is 16 at most, so that the rounded reciprocal is good enough.
  __device__ int node_of(int query) const { return query * (65536 / group + 1) >> 16; }
};

// The tiles of a row that any of its nodes sees; none of an unusable row.
struct RowShape {
  int64_t length = 0;
  int nodes = 0, first = 0, end = 0;
  bool usable = false;

  __device__ int tiles() const { return end - first; }
  __device__ int64_t slots() const { return length + nodes; }
};

__device__ inline RowShape row_shape(const Task& task, int64_t b) {
  RowShape row;
  const int64_t at = b * task.lengths_row;
  row.length = task.long_lengths ? static_cast<const int64_t*>(task.lengths)[at]
                                 : static_cast<const int32_t*>(task.lengths)[at];
  row.nodes = task.num_nodes ? task.num_nodes[b * task.num_nodes_row] : task.nodes;
  row.usable =
      row.nodes >= 0 && row.nodes <= task.nodes && row.length >= 0 && row.length <= task.slots - row.nodes;
  if (!row.usable || row.nodes == 0) return row;
  // A node without a bit of its own has depth -1.
  const int64_t seen = task.window > 0 && task.window < row.length ? row.length - task.window : 0;
  row.first = static_cast<int>(seen / kTile);
  row.end = static_cast<int>((row.slots() + kTile - 1) / kTile);
  return row;
}

// What the blocks of a launch know of its work, in shared memory.
struct Layout {
  int32_t* before;  // [batch + 1]: tiles of the rows in front, for one kv head
  int32_t* cuts;    // [groups + 1]: where a group's stretch begins
  int32_t* filled;  // rows that have tiles
};

// A group's stretch of one pair: tiles from .. to - 1 of its tiles first .. end - 1.
struct Piece {
  int b, head;
  int pair;  // where the pair begins among all tiles
  int first, end, from, to;

  __device__ bool begins() const { return from == first; }
  __device__ bool whole() const { return from == first && to == end; }
};

__device__ inline int find_row(const Layout& layout, int batch, int tile) {
  int low = 0, high = batch;  // before[low] <= tile < before[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (layout.before[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The piece that begins at tile x of all, in a stretch that ends at `stop`.
__device__ inline Piece piece_at(const Task& task, const Layout& layout, int x, int stop) {
  Piece piece;
  piece.b = find_row(layout, task.batch, x / task.kv_heads);
  const int tiles = layout.before[piece.b + 1] - layout.before[piece.b];
  const int within = x - layout.before[piece.b] * task.kv_heads;
  piece.head = within / tiles;
  piece.pair = x - within % tiles;
  piece.first = task.window > 0 ? row_shape(task, piece.b).first : 0;
  piece.end = piece.first + tiles;
  piece.from = piece.first + x - piece.pair;
  piece.to = min(piece.end, piece.from + stop - x);
  return piece;
}

// Next to tile x of all, where a chunk begins or a pair; a pair rather than a chunk if it is close.
__device__ inline int cut_near(const Task& task, const Layout& layout, int x, int all_tiles, int close) {
  if (x <= 0) return 0;
  if (x >= all_tiles) return all_tiles;
  const Piece piece = piece_at(task, layout, x, all_tiles);
  if (piece.from - piece.first <= close) return piece.pair;
  if (piece.end - piece.from <= close) return piece.pair + piece.end - piece.first;
  const int low = max(piece.from / kChunkTiles * kChunkTiles, piece.first);
  const int high = min(piece.from / kChunkTiles * kChunkTiles + kChunkTiles, piece.end);
  return piece.pair + (piece.from - low <= high - piece.from ? low : high) - piece.first;
}

// By all threads of the block. Where a whole number of groups can share each pair, and few are left over,
// pairs are cut evenly.
__device__ inline void lay_out(const Task& task, const Layout& layout) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int b = thread; b < task.batch; b += threads) layout.before[b + 1] = row_shape(task, b).tiles();
  __syncthreads();
  if (thread < 32) {
    int sum = 0, filled = 0;
    for (int begin = 1; begin <= task.batch; begin += 32) {
      int tiles = begin + thread <= task.batch ? layout.before[begin + thread] : 0;
      filled += __popc(__ballot_sync(0xffffffffu, tiles > 0));
#pragma unroll
      for (int reach = 1; reach < 32; reach *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, tiles, reach);
        if (thread >= reach) tiles += other;
      }
      if (begin + thread <= task.batch) layout.before[begin + thread] = sum + tiles;
      sum += __shfl_sync(0xffffffffu, tiles, 31);
    }
    if (thread == 0) {
      layout.before[0] = 0;
      *layout.filled = filled;
    }
  }
  __syncthreads();
  const int pairs = *layout.filled * task.kv_heads, all_tiles = layout.before[task.batch] * task.kv_heads;
  const int share = pairs > 0 ? task.groups / pairs : 0;
  const int groups = 20 * share * pairs >= 17 * task.groups ? share * pairs : task.groups;
  const int each = all_tiles / groups, rest = all_tiles - each * groups;
  for (int i = thread; i <= task.groups; i += threads) {
    const int x = each * i + rest * i / groups;  // all_tiles * i / groups
    layout.cuts[i] = i >= groups ? all_tiles : cut_near(task, layout, x, all_tiles, each / 24);
  }
  __syncthreads();
}

}  // namespace foretoken::cuda::attend

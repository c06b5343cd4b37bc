// Contract of tree attention: the new nodes of B rows attend to their row's cache, along the tree.
#pragma once

#include "math/tree_index.hpp"
#include "ops/tensor_view.hpp"

namespace foretoken {

constexpr int64_t kMaxHeadSize = 256;
constexpr int64_t kMaxGroup = 16;  // query heads that share a kv head

// Slots of a chunk. Chunk c is [512 c, 512 c + 512) of a row's slots, wherever they lie in memory and
// wherever the row ends. A chunk gives one partial result (maximum, sum of weights, weighted sum of values)
// per node and head. Partials are merged in an order that follows from the chunks' numbers alone: on the CPU
// in pairs, run i of 2^k chunks from runs 2 i and 2 i + 1 of 2^(k - 1), left in front; on CUDA 8 chunks, one
// behind the other, into a segment, and segments, one behind the other, into the row. A partial without a
// visible slot (sum 0) leaves the other one as it is, bit by bit. So a node's result depends on its own query
// and the slots it sees, not on who computes which chunks. Within a chunk a backend keeps an order of its
// own, fixed by the slots' place in the chunk alone; no other row's or node's maximum may enter a node's
// scaling.
constexpr int64_t kAttentionChunk = 512;

// What has to be zero of a workspace on CUDA before its first use: its first bytes.
constexpr int64_t kAttentionCounterBytes = 8192;

// B rows of up to T nodes, W = ceil(T / 64); Hq query heads, Hk kv heads, G = Hq / Hk (1 to 16), query head h
// reads kv head h / G; head size D (1 to 256); S slots a row.
//
// Slot s of row b: contiguous caches [B, S, Hk, D] have it at (b, s); paged ones [P, page, Hk, D], of any
// page size, at (block_table[b][s / page], s % page), and S = pages a row * page. The last dimension is
// dense, all other strides are arbitrary (K and V interleaved, HND, an expanded batch), and nothing is
// aligned further than its dtype: a backend that wants more looks at the view and takes another way, or
// refuses in words.
//
// With L = lengths[b] and n = num_nodes[b]: slots 0 .. L-1 are committed and their positions are their
// numbers; slot L + i holds K and V of node i, for i < n; nothing of a slot at L + n and behind, or of a page
// without a slot in front of that, is read in a way that reaches the output (it may hold NaN). Node r, at
// position p = L + depth(r), sees
//   committed slot s        iff window == 0 or s > p - window
//   the slot of node c < n  iff bit c % 64 of ancestors[b][r][c / 64] is set, and
//                               window == 0 or depth(c) > depth(r) - window
// depth(r) is the number of set bits among the first n of its words, minus 1 (-1 for words of zeros: such a
// node sees the committed slots alone). Without ancestors node r sees nodes 0 .. r, and depth(r) = r. Bits
// are taken as they are: one for a later node makes it visible, which is how blocks that see each other are
// written. A value (also NaN or infinity) in a slot that a node does not see never reaches that node.
//
//   score(r, s) = scale * k_scale * <q, k>;  softcap > 0: softcap * tanh(score / softcap)
//   out(r) = v_scale * sum exp(score) v / (sum exp(score) + exp(sinks[h])),  sinks absent: without the last
//   term lse(r) = log of that denominator, natural, float32; the sink is inside
// Scores, weights and sums are float32 or better; weights may be rounded to the dtype of q for the
// product with V. A node that sees nothing (and has no sink) has out 0 and lse -infinity.
// Nodes n .. T-1 of a row: out 0, lse -infinity. A row with n < 0, n > T, L < 0, L + n > S, or an unusable
// page id where a node may look: out and lse NaN for all its T nodes, and the other rows untouched. Nothing
// traps.
struct TreeAttentionArgs {
  TensorView q;          // [B, T, Hq, D] float32 | bfloat16 | float16
  TensorView k_cache;    // [B, S, Hk, D] | [P, page, Hk, D], dtype of q or float8_e4m3 | float8_e5m2
  TensorView v_cache;    // as k_cache, strides of its own
  TensorView lengths;    // [B] int32 | int64: committed tokens in front of the nodes
  TensorView num_nodes;  // [B] int32; null: T
  TensorView ancestors;  // [B, T, W] int64; null: causal among the nodes
  TensorView
      block_table;     // [B, pages a row] int32; null: contiguous. Entries behind slot L + n - 1 are not read
  TensorView sinks;    // [Hq] float32; null: none
  TensorView k_scale;  // [1] | [Hk] float32; null: 1
  TensorView v_scale;  // [1] | [Hk] float32; null: 1
  float scale = 1.0f;
  float softcap = 0.0f;  // 0: none
  int64_t window = 0;    // positions in sight, with the node's own; 0: all
  TensorView out;        // [B, T, Hq, D] of q's dtype, out
  TensorView lse;        // [B, T, Hq] float32 out; may be null
};

// Two partial results over disjoint slots, made one: weights exp(lse - max(lse_a, lse_b)) over their sum. A
// side with lse -infinity leaves the other as it is, bit by bit.
struct MergeArgs {
  TensorView out_a, out_b;  // [B, T, Hq, D] float32 | bfloat16 | float16, one dtype
  TensorView lse_a, lse_b;  // [B, T, Hq] float32
  TensorView out;           // [B, T, Hq, D] of that dtype, out
  TensorView lse;           // [B, T, Hq] float32 out
};

}  // namespace foretoken

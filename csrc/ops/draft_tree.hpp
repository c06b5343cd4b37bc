// Contract of growing a draft tree from a drafter's logits, and of cutting it to size.
#pragma once

#include "ops/tree.hpp"

namespace foretoken {

struct DraftTopkArgs {  // B requests, n frontier nodes each, V vocabulary, k children of each node
  TensorView logits;    // [B, n, V] float32 | bfloat16 | float16, innermost stride 1
  TensorView scores;    // [B, n] float32 cumulative log-probability of the nodes, -infinity: no node; null: 0
  TensorView entries;   // [B, n] int32 | int64 candidate index of the nodes; null: -1, the root
  TensorView tokens;    // [B, n, k] int32 out, largest logit first, lowest id first on ties; -1: no child
  TensorView children_scores;  // [B, n, k] float32 out; -infinity: no child
  TensorView parents;          // [B, n, k] int32 out: the node's entry
  TensorView status;           // [B, n] int32 out: kLawLost for the logits, kBadDraft for the score
};

struct FinalizeTreeArgs {  // B rows, M candidates, N nodes to keep, T = N + 1
  TensorView candidates;   // [B, M] int32 | int64 token ids
  TensorView scores;       // [B, M] float32, never above the parent's; -infinity: no candidate, not read on
  TensorView parents;      // [B, M] int32 | int64: index of an earlier candidate, -1 = the root
  TensorView budget;       // [B] int32 most drafts of each row; null: N. -1: a padded row
  TensorView tokens;       // [B, N] out, dtype of candidates; 0 behind the kept ones
  TensorView source;       // [B, N] int32 out: candidate index of each draft, -1 behind
  TreeIndexArgs index;     // parents [B, N] int32 (0 behind) and num_drafts [B] are outputs here
};

}  // namespace foretoken

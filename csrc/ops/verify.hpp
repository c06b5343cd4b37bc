// Contract of verification: chains and trees.
#pragma once

#include "ops/sampling.hpp"

namespace foretoken {

enum class Rule : uint8_t {
  automatic,      // target_only for point laws; else traversal wherever it cannot lose to rrs, else rrs
  rrs,            // recursive rejection sampling from the root down; on a chain: the token rule
  traversal,      // from the leaves up; on a chain: the block rule
  target_only,    // every draft is taken as deterministic, whatever law was declared for it
  spectr,         // k independent siblings as one optimal transport problem, level by level
  gbv,            // the path that ranks first among independent ones, block-verified against the law of that
  coupled,        // the token that shared Gumbel noise picks: no draft law is read
  lossy_typical,  // the rules below do not keep the target's law
  lossy_threshold,       //
  lossy_relaxed,         //
  lossy_entropy_window,  //
  lossy_synthetic,       //
};

constexpr int kRules = static_cast<int>(Rule::lossy_synthetic) + 1;

enum class Draw : uint8_t {
  deterministic,        // siblings were chosen, not drawn: no law is read
  iid,                  // drawn independently from one law
  without_replacement,  // each drawn from the law without its elder siblings, renormalised
  iid_paths,            // independent paths from the root; equal prefixes may share nodes (gbv only)
};

// How far the lossy rules may go. Nothing here touches a lossless rule.
struct Tolerance {
  float typical_epsilon = 0.09f, typical_delta = 0.3f;
  float threshold_single = 1.0f, threshold_sum = 1.0f;
  int32_t relaxed_top_k = 10;
  float relaxed_delta = 0.6f;
  float window_entropy = 1.0f, window_delta = 0.6f;  // nats
  const float* rates = nullptr;                      // [num_rates] target rate of depth 1, 2, ...; 0 behind
  int64_t num_rates = 0;
};

struct VerifyArgs {          // B rows, N draft nodes, T = N + 1, V vocabulary, M draft law rows, S slots
  TensorView target_logits;  // [B, T, V], row r = node r; or [R, V] with row_offsets
  TensorView
      target_stats;        // [B, T, tiles, 2] float32, or [R, ..]: TileStats of the rows; null: they are read
  TensorView row_offsets;  // [B + 1] int32 | int64: row b's nodes are rows row_offsets[b] .. of [R, V]
  TensorView draft_tokens;  // [B, N] int32 | int64
  TensorView parents;       // [B, N] int32 | int64: parent of node i + 1, a node <= i; null: a chain
  TensorView num_drafts;    // [B] int32; null: N. 0: a plain draw. -1: a padded row, nothing read or emitted
  TensorView draft_logits;  // [B, M, Vd] law the drafts were drawn from; null: see the next three
  TensorView draft_probs;   // [B, M, Vd] the same as final probabilities
  TensorView topk_ids;      // [B, M, k] int32 | int64: the same as a short list of ids (-1: no entry) ...
  TensorView topk_probs;    // [B, M, k] float32 ... and their final probabilities; all null: point laws
  TensorView draft_row;  // [B, T] int32 law row of each node's children, -1 = point; null: row r for node r
  TensorView draft_records;  // [B, M, 4] int64: laws of draft_logits as sample() wrote them; null: computed
  TensorView vocab_map;   // [Vd] int32 draft id -> target id, -1 = masked before drawing; null: the same ids
  TensorView bitmask;     // [B, T, ceil(V / 32)] int32, or [R, ..] with row_offsets; null: all is allowed
  TensorView base;        // [B] int64 absolute index of the first token this round emits
  TensorView slots;       // [B] int32 row -> sampling slot; null: row b uses slot b
  SamplingView sampling;  //
  SamplingView draft_sampling;  // applied to draft_logits by the function that drew
  bool target_constrained = false, draft_constrained = false;  // some slot of the tables has constraints
  HistoryView history;                                         // of the target's ids
  TensorView rules;  // [S] uint8 Rule of each slot; null: `rule` for all
  Rule rule = Rule::automatic;
  Draw draw = Draw::iid;
  int32_t num_paths = 1;  // of iid_paths
  Tolerance tolerance;

  TensorView tokens;  // [B, D + 1] out, dtype of draft_tokens; -1 behind the emitted ones; D: longest path
  TensorView num_emitted;   // [B] int32 out: accepted + the closing token; 0 for a padded row
  TensorView num_accepted;  // [B] int32 out
  TensorView path;          // [B, D] int32 out, may be null: accepted node numbers, -1 behind them
  TensorView
      path_rows;  // [B, D + 1] int64 out, may be null: target row each emitted token came from, -1 behind
  TensorView next_token;    // [B] out, dtype of draft_tokens: the closing token, root of the next round
  TensorView next_lengths;  // [B] int64 out: base - 1 + num_emitted
  TensorView status;        // [B] int32 out, StatusBit

  // Of each emitted token: under the law it was emitted from, and under the softmax of the logits as given.
  // The n likeliest beside it, best first, lowest id first on ties; all may be null.
  struct Logprobs {
    TensorView chosen;      // [B, D + 1] float32
    TensorView top_tokens;  // [B, D + 1, n] dtype of draft_tokens, -1 behind
    TensorView top;         // [B, D + 1, n] float32, -infinity for what has no mass
  };
  Logprobs processed, raw;
};

}  // namespace foretoken

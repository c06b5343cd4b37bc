// Contract of chain verification.
#pragma once

#include "ops/sampling.hpp"

namespace foretoken {

enum class Rule : uint8_t {
  automatic,  // block where a draft of the row was drawn from a dense law, token where none was
  token,
  block,
};

struct VerifyArgs {          // B rows, N draft nodes, T = N + 1, V vocabulary, M draft law rows
  TensorView target_logits;  // [B, T, V], row r = node r; or [R, V] with row_offsets
  TensorView row_offsets;    // [B + 1] int32 | int64: row b's nodes are rows row_offsets[b] .. of [R, V]
  TensorView draft_tokens;   // [B, N] int32 | int64
  TensorView num_drafts;     // [B] int32; null: N. 0: a plain draw. -1: a padded row, nothing read or emitted
  TensorView draft_logits;   // [B, M, V] law the drafts were drawn from; null: see draft_probs
  TensorView draft_probs;    // [B, M, V] the same as final probabilities; both null: point laws
  TensorView draft_row;      // [B, N] int32 law row of each draft, -1 = point; null: draft i has row i
  TensorView base;           // [B] int64 absolute index of the first token this round emits
  TensorView slots;          // [B] int32 row -> sampling slot; null: row b uses slot b
  SamplingView sampling;     //
  SamplingView draft_sampling;  // applied to draft_logits by the function that drew
  Rule rule = Rule::automatic;

  TensorView tokens;        // [B, N + 1] out, dtype of draft_tokens; -1 behind the emitted ones
  TensorView num_emitted;   // [B] int32 out: accepted + the closing token; 0 for a padded row
  TensorView num_accepted;  // [B] int32 out
  TensorView next_token;    // [B] out, dtype of draft_tokens: the closing token, root of the next round
  TensorView next_lengths;  // [B] int64 out: base - 1 + num_emitted
  TensorView status;        // [B] int32 out, StatusBit
  TensorView logprobs;  // [B, N + 1] float32 out, may be null: of each emitted token under the target's law
};

}  // namespace foretoken

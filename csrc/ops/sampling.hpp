// Contract of sampling: one token a row from the processed law of its logits.
#pragma once

#include "math/philox.hpp"
#include "ops/tensor_view.hpp"

namespace foretoken {

// What one request changes about its logits besides temperature and filters. Every list may be empty.
struct Constraints {
  const int32_t* bias_ids = nullptr;  // [num_bias] distinct
  const float* bias = nullptr;        // [num_bias] added to their logits
  int64_t num_bias = 0;
  const int32_t* held_ids = nullptr;  // [num_held] cannot be emitted before min_new_tokens are there
  int64_t num_held = 0;
  const int32_t* bad_words = nullptr;      // sequences back to back: the last token of one is banned wherever
  const int32_t* bad_word_ends = nullptr;  // [num_bad_words] the tokens before it have just been emitted
  int64_t num_bad_words = 0;
  float repetition = 1.0f;  // divides positive logits, multiplies the others, of tokens in prompt or output
  float frequency = 0.0f;   // subtracted once per time a token was generated
  float presence = 0.0f;    // subtracted once if it was generated at all
  int32_t min_new_tokens = 0;

  FORETOKEN_HD bool penalises() const { return repetition != 1.0f || frequency != 0.0f || presence != 0.0f; }
  FORETOKEN_HD bool needs_history() const { return penalises() || min_new_tokens > 0 || num_bad_words > 0; }
  FORETOKEN_HD bool any() const { return num_bias > 0 || needs_history(); }
};

// The sampling law of S request slots; arrays of length `size`, validated when they were filled.
struct SamplingView {
  const float* temperature = nullptr;  // [S] 0 = greedy
  const int32_t* top_k = nullptr;      // [S] 0 = off
  const float* top_p = nullptr;        // [S] in (0, 1], 1 = off
  const float* min_p = nullptr;        // [S] in [0, 1), 0 = off
  const uint64_t* seed = nullptr;      // [S]
  int64_t size = 0;
  const Constraints* constraints = nullptr;  // [S]; null: none of the slots has any
  // False: no slot had top-p without top-k when this was handed out, if one may have since. To find its
  // threshold the whole row has to be weighed.
  bool weighs_rows = true;
  bool filters_rows = true;  // the same of any filter
};

// What has been committed, by slot; row b's base says how much of it counts.
struct HistoryView {
  TensorView tokens;          // [S, L] int32 | int64: prompt, then output; null: no slot asks for it
  TensorView prompt_lengths;  // [S] int32 | int64: tokens of the prompt among them
};

// What can only be judged from the data of a row; the other rows of the batch are untouched by it.
enum StatusBit : int32_t {
  kBadDraft = 1,  // id, parent, count, law row or declared mass unusable: decoded with no drafts
  kLawLost = 2,   // the closing row had NaN, an infinity or no mass: closed by the defined argmax
  kBadRow = 4,    // slot, rule, base or row offsets outside their tables: nothing was read or emitted
};

enum class SampleMethod : uint8_t {
  inverse,  // 64 random bits on integer masses
  gumbel,   // the largest of logit + Gumbel noise keyed by position and token: what the coupled rule replays
};

struct SampleArgs {       // B rows, V vocabulary
  TensorView logits;      // [B, V] float32 | bfloat16 | float16, innermost stride 1
  TensorView base;        // [B] int64 absolute index of the round's first token
  TensorView slots;       // [B] int32 row -> sampling slot; null: row b uses slot b
  TensorView bitmask;     // [B, ceil(V / 32)] int32, bit v % 32 of word v / 32: v is allowed; null: all are
  TensorView path;        // [B, P] int32 | int64 drafted since `base`, -1 = no token; null: nothing
  TensorView vocab_map;   // [V] int32 row id -> emitted id, -1 = masked; null: the same ids
  SamplingView sampling;  //
  bool constrained = false;   // some slot of sampling has constraints
  HistoryView history;        //
  int64_t emitted_vocab = 0;  // ids of the history, bias and bad words are below this; V without a map
  Purpose purpose = Purpose::plain;
  SampleMethod method = SampleMethod::inverse;
  int32_t step = 0;     // index of the draw in its round
  TensorView tokens;    // [B] int64 out
  TensorView logprobs;  // [B] float32 out, may be null: log-probability under the law drawn from
  TensorView status;    // [B] int32 out, may be null
  TensorView records;   // [B, 4] int64 out, may be null: the law drawn from, as verify takes it
};

}  // namespace foretoken

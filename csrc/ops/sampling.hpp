// Contract of sampling: one token a row from the processed law of its logits.
#pragma once

#include "math/philox.hpp"
#include "ops/tensor_view.hpp"

namespace foretoken {

// The sampling law of S request slots; arrays of length `size`, validated when they were filled.
struct SamplingView {
  const float* temperature = nullptr;  // [S] 0 = greedy
  const int32_t* top_k = nullptr;      // [S] 0 = off
  const float* top_p = nullptr;        // [S] in (0, 1], 1 = off
  const float* min_p = nullptr;        // [S] in [0, 1), 0 = off
  const uint64_t* seed = nullptr;      // [S]
  int64_t size = 0;
};

// What can only be judged from the data of a row; the other rows of the batch are untouched by it.
enum StatusBit : int32_t {
  kBadDraft = 1,  // id, count, law row or declared mass unusable: the row was decoded with no drafts
  kLawLost = 2,   // the closing row had NaN, an infinity or no mass: closed by the defined argmax
  kBadRow = 4,    // slot or row offsets outside their tables: nothing was read or emitted
};

struct SampleArgs {       // B rows, V vocabulary
  TensorView logits;      // [B, V] float32 | bfloat16 | float16, innermost stride 1
  TensorView base;        // [B] int64 absolute index of the round's first token
  TensorView slots;       // [B] int32 row -> sampling slot; null: row b uses slot b
  SamplingView sampling;  //
  Purpose purpose = Purpose::plain;
  int32_t step = 0;     // index of the draw in its round
  TensorView tokens;    // [B] int64 out
  TensorView logprobs;  // [B] float32 out, may be null: log-probability under the law drawn from
  TensorView status;    // [B] int32 out, may be null
};

}  // namespace foretoken

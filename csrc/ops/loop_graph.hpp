// Contract of rounds that the device repeats by itself.
#pragma once

#include "ops/tensor_view.hpp"

namespace foretoken {

enum class LoopEnd : int32_t { none, finished, limit, cancelled };  // why it stopped; none: it runs

enum LoopField : int32_t { kLoopRounds, kLoopEnd, kLoopFields };

struct LoopGraphArgs {     // B rows, S slots, records of W numbers a row
  TensorView next_drafts;  // [S] int32: below 0 where nobody is decoding
  TensorView slots;        // [B] int32
  TensorView record;       // [B, W] int32: of a round, written anew by each; may be null
  TensorView history;      // [R, B, W] int32 out: the records of all rounds; null if record is
  TensorView most_rounds;  // [1] int32 in: rounds of a launch
  TensorView progress;     // [kLoopFields] int32 out
};

}  // namespace foretoken

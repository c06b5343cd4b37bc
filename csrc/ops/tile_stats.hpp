// Contract of tile statistics: what each tile of 1024 logits of a row holds, in two floats, as whoever
// computed the logits can have them on the way.
#pragma once

#include "math/row_law.hpp"
#include "ops/sampling.hpp"

namespace foretoken {

constexpr int64_t tiles_of(int64_t size) { return (size + kTile - 1) / kTile; }

struct TileStats {
  float max;  // largest element, NaN passed over
  float sum;  // of weights relative to it; 0 in a greedy row
};

// Not a number that a tile of finite logits could have: what it is in makes a row unusable.
FORETOKEN_INLINE bool is_regular(float max, float sum, bool greedy) {
  return max == max && sum >= 0.0f && sum <= static_cast<float>(kTile + 1) && (greedy || max < 3.4028235e38f);
}

struct TileStatsArgs {    // B rows or B rows of T, V vocabulary
  TensorView logits;      // [B, V] or [B, T, V] float32 | bfloat16 | float16, innermost stride 1
  TensorView slots;       // [B] int32 row -> sampling slot; null: row b uses slot b
  SamplingView sampling;  // of which the temperature is read
  TensorView out;         // [B, tiles, 2] or [B, T, tiles, 2] float32 out, contiguous
};

}  // namespace foretoken

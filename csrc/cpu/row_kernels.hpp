// The inner loops of a row, one tile of 1024 elements at a time. Compiled once per instruction set from
// row_kernels.inl; every path gives the same bits, because the order of the sums is part of the source.
#pragma once

#include "math/half.hpp"
#include "math/row_law.hpp"
#include "ops/tensor_view.hpp"

namespace foretoken::cpu {

constexpr int kGroups = 16;  // maxima per tile, each over 64 elements: they bound the k-th largest

struct TileMax {
  float max;  // NaN passed over; -infinity if there is nothing else
  bool has_nan;
};

struct TileExtremes {
  float max, min;  // NaN passed over
  bool has_nan;
};

struct RowKernels {
  const char* name;
  // tile[0..count) = row[first..first + count) as float32, the rest = pad.
  void (*load)(const void* row, DType dtype, int64_t first, int64_t count, float pad, float* tile);
  TileMax (*max_of)(const float* tile);
  TileExtremes (*extremes)(const float* tile);
  void (*group_max)(const float* tile, float* groups);
  // Sums in the pinned order: four quarters folded, three folds of neighbours, five folds of halves.
  // What they make of a NaN is undefined: its payload may reach the exponent.
  float (*sum_weights)(const float* tile, float anchor, float scale, float cut);
  float (*sum_probs)(const float* tile, float cut);
  float (*sum_residual)(const float* target, const RowLaw& target_law, const float* draft,
                        const RowLaw& draft_law, float gain);
  // Integer masses of a tile, summed or one by one; draft == nullptr: of the target's law itself.
  uint64_t (*sum_masses)(const float* target, const RowLaw& target_law, const float* draft,
                         const RowLaw& draft_law, float gain);
  void (*masses)(const float* target, const RowLaw& target_law, const float* draft, const RowLaw& draft_law,
                 float gain, uint64_t* out);
  // Copies the elements >= bound to out (room for a whole tile needed), returns how many.
  int64_t (*at_least)(const float* tile, float bound, float* out);
};

const RowKernels& row_kernels();                        // best path of this machine, or FORETOKEN_CPU
const RowKernels* row_kernels_named(const char* name);  // nullptr: not built in, or not supported here
void force_row_kernels(const RowKernels& kernels);      // for tests

}  // namespace foretoken::cpu

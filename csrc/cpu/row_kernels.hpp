// The inner loops of a row, one tile of 1024 elements at a time. Compiled once per instruction set from
// row_kernels.inl; every path gives the same bits, because the order of the sums is part of the source.
#pragma once

#include "math/half.hpp"
#include "math/row_law.hpp"
#include "ops/tensor_view.hpp"

namespace foretoken::cpu {

constexpr int kGroups = 16;  // of 64 elements each in a tile: their maxima bound the k-th largest

// kTile elements side by side: a whole tile of a row, where it lies.
struct TileRef {
  const void* elements = nullptr;
  DType dtype = DType::float32;
};

struct TileMax {
  float max;  // NaN passed over; -infinity if there is nothing else
  bool has_nan;
};

struct LogitsTile {
  float max;     // largest element; anything if not regular
  float sum;     // float32 sum of weights relative to it, 0 if it is -infinity
  bool regular;  // neither NaN nor +infinity in it
};

struct ProbsTile {
  float max, min;  // NaN passed over
  float sum;       // of the elements at or above the cut
  bool has_nan;
};

// What a kernel sums it sums in the pinned order: four quarters folded, three folds of neighbours, five folds
// of halves. The two tiles of a residual have one dtype; draft.elements == nullptr: the target's law itself.
struct RowKernels {
  const char* name;
  // tile[0..count) = row[first..first + count) as float32, the rest = pad.
  void (*load)(const void* row, DType dtype, int64_t first, int64_t count, float pad, float* tile);
  TileMax (*max_of)(TileRef tile);
  void (*group_max)(TileRef tile, float* groups);
  // First pass over a row: `count` tiles that follow one another.
  void (*summarise_logits)(TileRef first, int64_t count, float scale, LogitsTile* out);
  void (*summarise_probs)(TileRef first, int64_t count, float cut, ProbsTile* out);
  // The same of one tile with another cut; quick where it leaves little of the tile.
  float (*sum_weights)(TileRef tile, float anchor, float scale, float cut);
  float (*sum_residual)(TileRef target, const RowLaw& target_law, TileRef draft, const RowLaw& draft_law,
                        float gain);
  // Integer masses of a tile, summed or one by one.
  uint64_t (*sum_masses)(TileRef target, const RowLaw& target_law, TileRef draft, const RowLaw& draft_law,
                         float gain);
  void (*masses)(TileRef target, const RowLaw& target_law, TileRef draft, const RowLaw& draft_law, float gain,
                 uint64_t* out);
  // Copies the elements in [low, high) to out (room for a whole tile needed), in any order; returns how many.
  int64_t (*between)(TileRef tile, float low, float high, float* out);
  // The largest of `count` float32, NaN passed over: a read and nothing else, for benchmarks to be held
  // against.
  float (*plain_read)(const float* elements, int64_t count);
};

const RowKernels& row_kernels();                        // best path of this machine, or FORETOKEN_CPU
const RowKernels* row_kernels_named(const char* name);  // nullptr: not built in, or not supported here
void force_row_kernels(const RowKernels& kernels);      // for tests

}  // namespace foretoken::cpu

// Attention over a chunk, for one instruction set. Include behind a header that defines, in an unnamed
// namespace within foretoken::cpu, the vector `Vec` of kLanes floats and its operations, kScoreRows and
// kMixRows (rows of a block of registers that is two vectors wide), kScoreDepth (products that are summed in
// one go), and FORETOKEN_ATTENTION, the table's name; or FORETOKEN_ATTENTION_TILES, where attention_tiles.inl
// follows in place of the products of vectors and of the table.
#include <algorithm>
#include <limits>

#include "cpu/attention_kernels.hpp"
#include "math/float8.hpp"

namespace foretoken::cpu {

namespace {

constexpr int64_t kLanes = Vec::kLanes;
constexpr int64_t kPanel = 2 * kLanes;  // columns, or elements of a value, that a block of registers is wide
constexpr int64_t kMixColumns = 128;    // columns of a block of values that stays in the first-level cache
constexpr float kUnseen = -std::numeric_limits<float>::infinity();

// 2^x for x <= 0, NaN for NaN; 0 below -126.
inline Vec exp2_of(Vec x) {
  const Vec bounded = larger(Vec::all(-126.0f), x);  // a NaN in x stays
  const Vec whole = nearest_whole(bounded);
  const Vec fraction = subtract(bounded, whole);
  Vec power = Vec::all(0x1.5bba14p-10f);
  power = multiply_add(power, fraction, Vec::all(0x1.3cea88p-7f));
  power = multiply_add(power, fraction, Vec::all(0x1.c6b752p-5f));
  power = multiply_add(power, fraction, Vec::all(0x1.ebf9bcp-3f));
  power = multiply_add(power, fraction, Vec::all(0x1.62e42ap-1f));
  power = multiply_add(power, fraction, Vec::all(1.0f));
  return where_less(x, Vec::all(-126.0f), Vec::zero(), times_power_of_two(power, whole));
}

// tanh to a few units in the last place: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
inline Vec tanh_of(Vec x) {
  const Vec size = absolute(x), square = multiply(x, x);
  Vec near = Vec::all(-5.70498872745e-3f);
  near = multiply_add(near, square, Vec::all(2.06390887954e-2f));
  near = multiply_add(near, square, Vec::all(-5.37397155531e-2f));
  near = multiply_add(near, square, Vec::all(1.33314422036e-1f));
  near = multiply_add(near, square, Vec::all(-3.33332819422e-1f));
  near = multiply_add(multiply(near, square), x, x);
  const Vec falling = exp2_of(multiply(size, Vec::all(-2.8853900817779268f)));  // e^(-2 |x|)
  const Vec far = divide(subtract(Vec::all(1.0f), falling), add(Vec::all(1.0f), falling));
  return where_less(size, Vec::all(0.625f), near, with_sign_of(far, x));
}

}  // namespace

}  // namespace foretoken::cpu

#include "cpu/attention_pack.inl"
#include "cpu/attention_rows.inl"
#ifndef FORETOKEN_ATTENTION_TILES
#include "cpu/attention_products.inl"
#endif

namespace foretoken::cpu {

namespace {

#ifndef FORETOKEN_ATTENTION_TILES

// Scores to weights, with the row's maximum and sum.
inline void weigh(const ChunkTask& task, int64_t row, int64_t width, float* scores) {
  if (task.softcap > 0.0f) {
    const Vec cap = Vec::all(task.softcap);
    for (int64_t c = 0; c < width; c += kLanes)
      multiply(tanh_of(Vec::load(scores + c)), cap).store(scores + c);
  }
  if (task.seen != nullptr) {
    const uint32_t* seen = task.seen + row / task.group * kAttentionChunk;
    const int64_t from = task.mask_from / kLanes * kLanes;
    for (int64_t c = task.mask_from; c < std::min(from + kLanes, task.columns); ++c) {
      if (seen[c] == 0) scores[c] = kUnseen;
    }
    for (int64_t c = from + kLanes; c < width; c += kLanes) unless_unseen(scores + c, seen + c);
  }
  for (int64_t c = 0; c < task.first; ++c) scores[c] = kUnseen;
  for (int64_t c = task.columns; c < width; ++c) scores[c] = kUnseen;
  Vec most = Vec::all(kUnseen);
  for (int64_t c = 0; c < width; c += kLanes) most = larger(Vec::load(scores + c), most);  // passes over NaN
  const float max = largest_of(most);
  const float anchor = max == kUnseen ? 0.0f : max;
  Vec sum = Vec::zero();
  for (int64_t c = 0; c < width; c += kLanes) {
    const Vec weight = exp2_of(subtract(Vec::load(scores + c), Vec::all(anchor)));
    sum = add(sum, weight);
    weight.store(scores + c);
  }
  task.out.maxima[row] = anchor;
  task.out.sums[row] = sum_of(sum);
}

template <class From>
inline void add_odd(const ChunkTask& task, const OddColumns& odd, int64_t row, const float* weights) {
  for (int64_t i = 0; i < odd.count; ++i) {
    const int64_t column = odd.column[i];
    if (weights[column] == 0.0f) continue;
    for (int64_t d = 0; d < task.size; d += kLanes) {
      float* values = task.out.values + row * task.padded + d;
      const Vec line = From::load(task.values[column], d, task.size);
      multiply_add(Vec::all(weights[column]), line, Vec::load(values)).store(values);
    }
  }
}

// What is packed is packed for the first block of rows. If that is the only one, each panel overwrites the
// one before, in the first-level cache.
template <class From>
void weigh_block(const ChunkTask& task, const ChunkScratch& scratch, int64_t row, int64_t rows) {
  const int64_t width = (task.columns + kPanel - 1) / kPanel * kPanel;
  for (int64_t c = task.first / kPanel * kPanel; c < width; c += kPanel) {
    float* panel = scratch.keys + (task.rows > kRowBlock ? c * task.padded : 0);
    if (row == 0) pack_keys<From>(task, c, panel);
    in_blocks<kScoreRows>(rows, [&](auto block, int64_t r) {
      score<decltype(block)::kCount>(task.queries + (row + r) * task.padded, panel, task.padded,
                                     scratch.scores + r * kScoreStride + c);
    });
  }
  for (int64_t r = 0; r < rows; ++r) weigh(task, row + r, width, scratch.scores + r * kScoreStride);
}

template <class From>
void mix_block(const ChunkTask& task, const ChunkScratch& scratch, int64_t row, int64_t rows,
               OddColumns& odd) {
  for (int64_t begin = task.first / kMixColumns * kMixColumns; begin < task.columns; begin += kMixColumns) {
    const int64_t count = std::min(kMixColumns, task.columns - begin);
    const int64_t at = task.rows > kRowBlock ? begin : 0;
    if (row == 0) pack_values<From>(task, begin, begin + count, at, scratch.values, odd);
    for (int64_t d = 0; d < task.padded; d += kPanel) {
      const int64_t width = std::min(kPanel, task.padded - d);
      const float* panel = scratch.values + d * kAttentionChunk + at * width;
      in_blocks<kMixRows>(rows, [&](auto block, int64_t r) {
        constexpr int kRows = decltype(block)::kCount;
        const float* weights = scratch.scores + r * kScoreStride + begin;
        float* values = task.out.values + (row + r) * task.padded + d;
        if (width == kPanel) {
          mix<kRows, 2>(weights, panel, count, task.padded, values);
        } else {
          mix<kRows, 1>(weights, panel, count, task.padded, values);
        }
      });
    }
  }
}

// A block of columns, for so few rows that packing would cost more: values from where they lie. The same
// products in the same order.
template <class From, int rows>
void mix_in_place(const ChunkTask& task, const float* weights, int64_t begin, int64_t end) {
  constexpr int64_t kAhead = 12;
  constexpr int kVectors = rows <= 4 ? 4 : 2;
  for (int64_t d = 0; d < task.size; d += kVectors * kLanes) {
    Vec sums[rows][kVectors];
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 16
      for (int n = 0; n < kVectors; ++n) sums[m][n] = Vec::zero();
    }
    for (int64_t column = begin; column < end; ++column) {
      const void* row = task.values[column];
      const void* ahead = task.values[std::min(column + kAhead, task.columns - 1)];
      Vec line[kVectors];
#pragma GCC unroll 16
      for (int n = 0; n < kVectors; ++n) {
        line[n] = From::load(row, d + n * kLanes);
        __builtin_prefetch(From::at(ahead, d + n * kLanes));
      }
#pragma GCC unroll 16
      for (int m = 0; m < rows; ++m) {
        const Vec weight = Vec::all(weights[m * kScoreStride + column]);
#pragma GCC unroll 16
        for (int n = 0; n < kVectors; ++n) sums[m][n] = multiply_add(weight, line[n], sums[m][n]);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 16
      for (int n = 0; n < kVectors; ++n) {
        float* to = task.out.values + m * task.padded + d + n * kLanes;
        add(Vec::load(to), sums[m][n]).store(to);
      }
    }
  }
}

// Whether it did. Values that are not finite and only some rows see need the other way.
template <class From>
bool mix_few(const ChunkTask& task, const float* weights) {
  if (task.rows > kMixRows || task.size % (4 * kLanes) != 0) return false;
  if (task.seen != nullptr) {
    for (int64_t column = task.mask_from; column < task.columns; ++column) {
      if (!is_finite<From>(task.values[column], task.size)) return false;
    }
  }
  for (int64_t block = task.first / kMixColumns; block * kMixColumns < task.columns; ++block) {
    const int64_t begin = std::max(block * kMixColumns, task.first);
    const int64_t end = std::min((block + 1) * kMixColumns, task.columns);
    in_blocks<kMixRows>(task.rows, [&](auto rows, int64_t) {
      mix_in_place<From, decltype(rows)::kCount>(task, weights, begin, end);
    });
  }
  return true;
}

template <class From>
void attend_from(const ChunkTask& task, const ChunkScratch& scratch) {
  OddColumns odd;
  std::fill(task.out.values, task.out.values + task.rows * task.padded, 0.0f);
  for (int64_t row = 0; row < task.rows; row += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, task.rows - row);
    weigh_block<From>(task, scratch, row, rows);
    if (mix_few<From>(task, scratch.scores)) return;
    mix_block<From>(task, scratch, row, rows, odd);
    for (int64_t r = 0; r < rows && odd.count > 0; ++r)
      add_odd<From>(task, odd, row + r, scratch.scores + r * kScoreStride);
  }
}

void attend(const ChunkTask& task, const ChunkScratch& scratch) {
  switch (task.dtype) {
    case DType::bfloat16: return attend_from<Source<DType::bfloat16>>(task, scratch);
    case DType::float16: return attend_from<Source<DType::float16>>(task, scratch);
    case DType::float8_e4m3: return attend_from<Source<DType::float8_e4m3>>(task, scratch);
    case DType::float8_e5m2: return attend_from<Source<DType::float8_e5m2>>(task, scratch);
    default: return attend_from<Source<DType::float32>>(task, scratch);
  }
}

#endif

}  // namespace

#ifndef FORETOKEN_ATTENTION_TILES
extern const AttentionKernels FORETOKEN_ATTENTION;
const AttentionKernels FORETOKEN_ATTENTION = {
    FORETOKEN_ATTENTION_NAME, attend, widen, arrange, merge, narrow, false};
#endif

}  // namespace foretoken::cpu

// Scores and weighted sums of a block of registers. A part of attention_kernels.inl.

namespace foretoken::cpu {

namespace {

template <int rows>
struct Rows {
  static constexpr int kCount = rows;
};

// call(Rows<n>{}, first row) for blocks of `most` rows and one of what is left.
template <int most, class Call>
inline void in_blocks(int64_t rows, Call call) {
  int64_t row = 0;
  for (; row + most <= rows; row += most) call(Rows<most>{}, row);
  if constexpr (most > 1) {
    if (row < rows) in_blocks<most - 1>(rows - row, [&](auto block, int64_t r) { call(block, row + r); });
  }
}

// Queries of a block of rows alternate.
void arrange(int64_t rows, int64_t padded, const float* queries, float* out) {
  for (int64_t first = 0; first < rows; first += kRowBlock) {
    in_blocks<kScoreRows>(std::min(kRowBlock, rows - first), [&](auto block, int64_t r) {
      constexpr int64_t kCount = decltype(block)::kCount;
      const int64_t offset = (first + r) * padded;
      for (int64_t d = 0; d < padded; ++d) {
        for (int64_t m = 0; m < kCount; ++m) out[offset + d * kCount + m] = queries[offset + m * padded + d];
      }
    });
  }
}

// scores [rows, kScoreStride] of one panel of keys. The queries of the block alternate: [padded, rows]. Sums
// of kScoreDepth products are added up, which keeps their rounding small.
template <int rows>
__attribute__((noinline)) void score(const float* queries, const float* panel, int64_t padded,
                                     float* scores) {
  for (int64_t begin = 0; begin < padded; begin += kScoreDepth) {
    Vec left[rows], right[rows];
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) left[m] = right[m] = Vec::zero();
    for (int64_t d = begin; d < std::min(begin + kScoreDepth, padded); ++d) {
      const Vec low = Vec::load(panel + d * kPanel), high = Vec::load(panel + d * kPanel + kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < rows; ++m) {
        const Vec query = Vec::all(queries[d * rows + m]);
        left[m] = multiply_add(query, low, left[m]);
        right[m] = multiply_add(query, high, right[m]);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
      float* to = scores + m * kScoreStride;
      if (begin > 0) left[m] = add(Vec::load(to), left[m]);
      if (begin > 0) right[m] = add(Vec::load(to + kLanes), right[m]);
      left[m].store(to);
      right[m].store(to + kLanes);
    }
  }
}

// values [rows, padded] += weights [rows, kScoreStride] * a panel of values, over a block of columns.
template <int rows, int vectors>
__attribute__((noinline)) void mix(const float* weights, const float* panel, int64_t columns, int64_t padded,
                                   float* values) {
  Vec sums[rows][vectors];
#pragma GCC unroll 16
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < vectors; ++n) sums[m][n] = Vec::zero();
  }
  for (int64_t column = 0; column < columns; ++column) {
    Vec line[vectors];
#pragma GCC unroll 16
    for (int n = 0; n < vectors; ++n) line[n] = Vec::load(panel + column * vectors * kLanes + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
      const Vec weight = Vec::all(weights[m * kScoreStride + column]);
#pragma GCC unroll 16
      for (int n = 0; n < vectors; ++n) sums[m][n] = multiply_add(weight, line[n], sums[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < vectors; ++n) {
      float* to = values + m * padded + n * kLanes;
      add(Vec::load(to), sums[m][n]).store(to);
    }
  }
}

}  // namespace

}  // namespace foretoken::cpu

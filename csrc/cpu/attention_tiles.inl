// Attention over a chunk by products of matrix tiles, for queries and a cache of bfloat16. Include behind
// attention_kernels.inl, within the vector's file; two functions have to be there too:
//   zip_halves(a, b, low, high): of two lines of 32 bfloat16, (a0, b0, a1, b1 ... b15) and (a16 ... b31);
//   narrow_weights(weights, to): to the nearest bfloat16, of what is 0, normal or NaN.
//
// Queries are not scaled, the scores are. Weights are rounded to bfloat16. A row is a row of its tiles, which
// no other touches; columns are summed in ascending order in blocks of kTileDepth from the chunk's start, and
// what is not there or not seen is an exact zero, so that a row's bits are the same however it is called.
#include "cpu/tiles.hpp"

namespace foretoken::cpu {

namespace {

using Bfloat = Source<DType::bfloat16>;

constexpr int64_t kRowBytes = kScoreStride * static_cast<int64_t>(sizeof(float));  // of scores
constexpr int64_t kFewColumns = 128;  // whose values stay in the first-level cache

constexpr int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
constexpr int64_t depth_steps(int64_t size) { return (size + kTileDepth - 1) / kTileDepth; }

// Tiles [rows / 16][steps] of 16 rows.
void arrange_tiles(int64_t rows, int64_t padded, const float* queries, float* out) {
  const int64_t steps = depth_steps(padded);
  char* tiles = reinterpret_cast<char*>(out);
  std::memset(tiles, 0, static_cast<size_t>(whole(rows, kTileRows) / kTileRows * steps * kTileBytes));
  for (int64_t row = 0; row < rows; ++row) {
    char* line = tiles + row / kTileRows * steps * kTileBytes + row % kTileRows * kTileRowBytes;
    for (int64_t d = 0; d < padded; d += kLanes) {  // exact: they were bfloat16
      Vec::load(queries + row * padded + d)
          .narrow(Kind<DType::bfloat16>{}, line + d / kTileDepth * kTileBytes + d % kTileDepth * 2);
    }
  }
}

// `count` elements from `element` on, zeros behind the row's end.
inline const char* whole_line(const void* row, int64_t element, int64_t size, int64_t count, char* room) {
  const int64_t there = std::min(count, size - element);
  if (there == count) return Bfloat::at(row, element);
  std::memset(room, 0, static_cast<size_t>(2 * count));
  if (there > 0) std::memcpy(room, Bfloat::at(row, element), static_cast<size_t>(2 * there));
  return room;
}

// The tiles of 16 columns' keys, one for each 32 elements: pairs of elements run down, columns across.
void pack_key_tiles(const ChunkTask& task, int64_t column, char* tiles) {
  constexpr int64_t kAhead = 2 * kTileColumns;
  const int64_t steps = depth_steps(task.size);
  for (int64_t step = 0; step < steps; ++step, tiles += kTileBytes) {
    for (int64_t part = 0; part < kTileColumns; part += kLanes) {
      for (int64_t pair = 0; pair < kTileRows; pair += kLanes) {
        const int64_t element = step * kTileDepth + 2 * pair;
        Vec lines[kLanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t c = column + part + i;
          alignas(64) char room[sizeof(float) * kLanes];
          const bool there = c >= task.first && c < task.columns;
          lines[i] = there ? Vec::widen(Kind<DType::float32>{},
                                        whole_line(task.keys[c], element, task.size, 2 * kLanes, room))
                           : Vec::zero();
          if (c >= task.first && c + kAhead < task.columns)
            __builtin_prefetch(Bfloat::at(task.keys[c + kAhead], element));
        }
        transpose(lines);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) {
          lines[i].store(reinterpret_cast<float*>(tiles + (pair + i) * kTileRowBytes) + part);
        }
      }
    }
  }
}

// Whether a column's values take part in the products. If not, they are added one by one.
inline bool mixes(const ChunkTask& task, int64_t column, OddColumns& odd) {
  if (column < task.first || column >= task.columns) return false;
  if (task.seen == nullptr || column < task.mask_from) return true;
  if (is_finite<Bfloat>(task.values[column], task.size)) return true;
  odd.column[odd.count++] = static_cast<int16_t>(column);
  return false;
}

// The tiles of 32 columns' values, one for each 16 elements: pairs of columns run down, elements across.
void pack_value_tiles(const ChunkTask& task, int64_t column, char* tiles, OddColumns& odd) {
  constexpr int64_t kAhead = kTileDepth;
  alignas(64) static constexpr char kNone[2 * kMaxHeadSize] = {};
  for (int64_t pair = 0; pair < kTileRows; ++pair, tiles += kTileRowBytes) {
    const void* rows[2];
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t c = column + 2 * pair + i;
      rows[i] = mixes(task, c, odd) ? task.values[c] : kNone;
      if (c < task.first || c + kAhead >= task.columns) continue;
      for (int64_t d = 0; d < task.size; d += kTileDepth)
        __builtin_prefetch(Bfloat::at(task.values[c + kAhead], d));
    }
    for (int64_t d = 0; d < task.padded; d += kTileDepth) {
      alignas(64) char room[2][2 * kTileDepth], beyond[kTileRowBytes];
      char* low = tiles + d / kTileColumns * kTileBytes;
      zip_halves(whole_line(rows[0], d, task.size, kTileDepth, room[0]),
                 whole_line(rows[1], d, task.size, kTileDepth, room[1]), low,
                 d + kTileColumns < task.padded ? low + kTileBytes : beyond);
    }
  }
}

// Scores of `rows` rows (1 or 2 tiles of them) and 32 columns.
template <class Tiles, int row_tiles>
void score_tiles(const char* queries, const char* keys, int64_t steps, float* scores) {
  Tiles::template zero<0>();
  Tiles::template zero<1>();
  if constexpr (row_tiles == 2) {
    Tiles::template zero<2>();
    Tiles::template zero<3>();
  }
  for (int64_t step = 0; step < steps; ++step) {
    Tiles::template load<6>(keys + step * kTileBytes, kTileRowBytes);
    Tiles::template load<7>(keys + (steps + step) * kTileBytes, kTileRowBytes);
    Tiles::template load<4>(queries + step * kTileBytes, kTileRowBytes);
    Tiles::template multiply<0, 4, 6>();
    Tiles::template multiply<1, 4, 7>();
    if constexpr (row_tiles == 2) {
      Tiles::template load<5>(queries + (steps + step) * kTileBytes, kTileRowBytes);
      Tiles::template multiply<2, 5, 6>();
      Tiles::template multiply<3, 5, 7>();
    }
  }
  Tiles::template store<0>(scores, kRowBytes);
  Tiles::template store<1>(scores + kTileColumns, kRowBytes);
  if constexpr (row_tiles == 2) {
    Tiles::template store<2>(scores + kTileRows * kScoreStride, kRowBytes);
    Tiles::template store<3>(scores + kTileRows * kScoreStride + kTileColumns, kRowBytes);
  }
}

// Scores of kLanes columns that not all are there or seen: -infinity for the others.
void mask_columns(const ChunkTask& task, const uint32_t* seen, int64_t column, float* scores) {
  for (int64_t c = column; c < column + kLanes; ++c) {
    const bool there = c >= task.first && c < task.columns;
    if (!there || (seen != nullptr && c >= task.mask_from && seen[c] == 0)) scores[c] = kUnseen;
  }
}

// The weights of a row, as bfloat16 in the front half of its scores' room, with its maximum and sum.
void weigh_row(const ChunkTask& task, int64_t row, int64_t width, float* scores) {
  const uint32_t* seen = task.seen != nullptr ? task.seen + row / task.group * kAttentionChunk : nullptr;
  const int64_t whole_from = whole(task.first, kLanes), whole_to = task.columns / kLanes * kLanes;
  const int64_t masked_from = seen != nullptr ? task.mask_from / kLanes * kLanes : width;
  const Vec factor = Vec::all(task.factor), cap = Vec::all(task.softcap);
  Vec most = Vec::all(kUnseen);
  for (int64_t c = 0; c < width; c += kLanes) {
    Vec score = multiply(Vec::load(scores + c), factor);
    if (task.softcap > 0.0f) score = multiply(tanh_of(score), cap);
    score.store(scores + c);
    if (c < whole_from || c >= whole_to || c == masked_from) {
      mask_columns(task, seen, c, scores);
      score = Vec::load(scores + c);
    } else if (c > masked_from) {
      unless_unseen(scores + c, seen + c);
      score = Vec::load(scores + c);
    }
    most = larger(score, most);  // passes over NaN
  }
  const float max = largest_of(most);
  const float anchor = max == kUnseen ? 0.0f : max;
  char* weights = reinterpret_cast<char*>(scores);
  Vec sum = Vec::zero();
  for (int64_t c = 0; c < width; c += kLanes) {
    const Vec weight = exp2_of(subtract(Vec::load(scores + c), Vec::all(anchor)));
    sum = add(sum, weight);
    narrow_weights(weight, weights + 2 * c);
  }
  task.out.maxima[row] = anchor;
  task.out.sums[row] = sum_of(sum);
}

template <class Tiles>
void weigh_tiles(const ChunkTask& task, const ChunkScratch& scratch, int64_t row, int64_t rows) {
  const int64_t steps = depth_steps(task.size), width = whole(task.columns, kTileDepth);
  const char* queries = reinterpret_cast<const char*>(task.queries) + row / kTileRows * steps * kTileBytes;
  for (int64_t c = task.first / kTileDepth * kTileDepth; c < width; c += kTileDepth) {
    char* keys = reinterpret_cast<char*>(scratch.keys);
    if (task.rows > kRowBlock) keys += c / kTileColumns * steps * kTileBytes;
    if (row == 0) {
      pack_key_tiles(task, c, keys);
      pack_key_tiles(task, c + kTileColumns, keys + steps * kTileBytes);
    }
    for (int64_t r = 0; r < rows; r += 2 * kTileRows) {
      const char* tiles = queries + r / kTileRows * steps * kTileBytes;
      float* scores = scratch.scores + r * kScoreStride + c;
      if (rows - r > kTileRows) {
        score_tiles<Tiles, 2>(tiles, keys, steps, scores);
      } else {
        score_tiles<Tiles, 1>(tiles, keys, steps, scores);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) weigh_row(task, row + r, width, scratch.scores + r * kScoreStride);
}

// Sixteen rows and elements of what the values add up to; in memory of its own where not all rows are there.
class Sums {
 public:
  Sums(const ChunkTask& task, int64_t row, int64_t rows, int64_t element)
      : values_(task.out.values + row * task.padded + element), padded_(task.padded), rows_(rows) {
    if (rows_ >= kTileRows) return;
    std::memset(own_, 0, sizeof own_);
    for (int64_t r = 0; r < rows_; ++r) std::memcpy(own_[r], values_ + r * padded_, kTileRowBytes);
  }
  ~Sums() {
    for (int64_t r = 0; rows_ < kTileRows && r < rows_; ++r)
      std::memcpy(values_ + r * padded_, own_[r], kTileRowBytes);
  }
  float* place() { return rows_ < kTileRows ? own_[0] : values_; }
  int64_t stride() const { return rows_ < kTileRows ? kTileRowBytes : padded_ * int64_t{sizeof(float)}; }

 private:
  alignas(64) float own_[kTileRows][kTileColumns];
  float* values_;
  int64_t padded_, rows_;
};

// Sums of 1 or 2 tiles of rows and of elements gain the values of `steps` times 32 columns.
template <class Tiles, int row_tiles, int element_tiles>
void mix_tiles(const float* weights, const char* values, int64_t apart, int64_t steps, Sums* sums) {
  const auto all = [&](auto call) {
    call(std::integral_constant<int, 0>{});
    if constexpr (element_tiles == 2) call(std::integral_constant<int, 1>{});
    if constexpr (row_tiles == 2) call(std::integral_constant<int, 2>{});
    if constexpr (row_tiles == 2 && element_tiles == 2) call(std::integral_constant<int, 3>{});
  };
  all([&](auto t) { Tiles::template load<decltype(t)::value>(sums[t].place(), sums[t].stride()); });
  for (int64_t step = 0; step < steps; ++step) {
    const char* tiles = values + step * apart;
    const char* rows = reinterpret_cast<const char*>(weights) + step * kTileRowBytes;
    Tiles::template load<6>(tiles, kTileRowBytes);
    Tiles::template load<4>(rows, kRowBytes);
    Tiles::template multiply<0, 4, 6>();
    if constexpr (element_tiles == 2) {
      Tiles::template load<7>(tiles + kTileBytes, kTileRowBytes);
      Tiles::template multiply<1, 4, 7>();
    }
    if constexpr (row_tiles == 2) {
      Tiles::template load<5>(rows + kTileRows * kRowBytes, kRowBytes);
      Tiles::template multiply<2, 5, 6>();
      if constexpr (element_tiles == 2) Tiles::template multiply<3, 5, 7>();
    }
  }
  all([&](auto t) { Tiles::template store<decltype(t)::value>(sums[t].place(), sums[t].stride()); });
}

template <class Tiles>
void mix_columns(const ChunkTask& task, const ChunkScratch& scratch, int64_t row, int64_t rows, int64_t begin,
                 int64_t steps, const char* values) {
  const int64_t apart = task.padded / kTileColumns * kTileBytes;
  for (int64_t r = 0; r < rows; r += 2 * kTileRows) {
    const float* weights = scratch.scores + r * kScoreStride + begin / 2;
    for (int64_t d = 0; d < task.padded; d += 2 * kTileColumns) {
      const char* tiles = values + d / kTileColumns * kTileBytes;
      const auto sums_at = [&](int64_t down, int64_t across) {
        const int64_t left = std::max<int64_t>(rows - r - down, 0);
        return Sums(task, row + r + down, left, d + across);
      };
      const bool two_rows = rows - r > kTileRows, two_elements = task.padded - d > kTileColumns;
      const int64_t down = two_rows ? kTileRows : 0, across = two_elements ? kTileColumns : 0;
      if (two_rows && two_elements) {
        Sums sums[] = {sums_at(0, 0), sums_at(0, across), sums_at(down, 0), sums_at(down, across)};
        mix_tiles<Tiles, 2, 2>(weights, tiles, apart, steps, sums);
      } else if (two_rows) {
        Sums sums[] = {sums_at(0, 0), sums_at(0, 0), sums_at(down, 0)};
        mix_tiles<Tiles, 2, 1>(weights, tiles, apart, steps, sums);
      } else if (two_elements) {
        Sums sums[] = {sums_at(0, 0), sums_at(0, across)};
        mix_tiles<Tiles, 1, 2>(weights, tiles, apart, steps, sums);
      } else {
        Sums sums[] = {sums_at(0, 0)};
        mix_tiles<Tiles, 1, 1>(weights, tiles, apart, steps, sums);
      }
    }
  }
}

void add_odd_tiles(const ChunkTask& task, const OddColumns& odd, int64_t row, const float* scores) {
  const uint16_t* weights = reinterpret_cast<const uint16_t*>(scores);
  for (int64_t i = 0; i < odd.count; ++i) {
    const int64_t column = odd.column[i];
    const float weight = float_of_bfloat(weights[column]);
    if (weight == 0.0f) continue;
    for (int64_t d = 0; d < task.size; d += kLanes) {
      float* values = task.out.values + row * task.padded + d;
      const Vec line = Bfloat::load(task.values[column], d, task.size);
      multiply_add(Vec::all(weight), line, Vec::load(values)).store(values);
    }
  }
}

template <class Tiles>
void attend_tiles(const ChunkTask& task, const ChunkScratch& scratch) {
  OddColumns odd;
  std::fill(task.out.values, task.out.values + task.rows * task.padded, 0.0f);
  Tiles::begin();
  const int64_t first = task.first / kTileDepth * kTileDepth, width = whole(task.columns, kTileDepth);
  const bool few = task.rows <= kRowBlock;  // a block of values at a time, packed and used up
  const int64_t apart = task.padded / kTileColumns * kTileBytes;
  for (int64_t row = 0; row < task.rows; row += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, task.rows - row);
    weigh_tiles<Tiles>(task, scratch, row, rows);
    const int64_t block = few ? kFewColumns : width;
    for (int64_t begin = first; begin < width; begin += block) {
      const int64_t steps = std::min(block, width - begin) / kTileDepth;
      char* values = reinterpret_cast<char*>(scratch.values);
      for (int64_t step = 0; row == 0 && step < steps; ++step)
        pack_value_tiles(task, begin + step * kTileDepth, values + step * apart, odd);
      mix_columns<Tiles>(task, scratch, row, rows, begin, steps, values);
    }
    for (int64_t r = 0; r < rows && odd.count > 0; ++r)
      add_odd_tiles(task, odd, row + r, scratch.scores + r * kScoreStride);
  }
  Tiles::end();
}

}  // namespace

}  // namespace foretoken::cpu

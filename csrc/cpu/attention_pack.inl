// Reading the cache: widened and laid out as the products want it. A part of attention_kernels.inl.

namespace foretoken::cpu {

namespace {

template <DType dtype>
struct Source {
  static constexpr int64_t kBytes = bytes_of(dtype);
  static constexpr bool kPairs =
      dtype == DType::bfloat16;  // two elements fit a lane, and a shift widens them
  static const char* at(const void* row, int64_t element) {
    return static_cast<const char*>(row) + element * kBytes;
  }
  static Vec load(const void* row, int64_t element) { return Vec::widen(Kind<dtype>{}, at(row, element)); }
  static Vec load_raw(const void* row, int64_t element) {
    return kPairs ? Vec::widen(Kind<DType::float32>{}, at(row, element)) : load(row, element);
  }
  static Vec load(const void* row, int64_t element, int64_t size) {
    if (size - element >= kLanes) return load(row, element);
    alignas(64) char part[sizeof(float) * kMaxLanes] = {};
    std::memcpy(part, at(row, element), static_cast<size_t>((size - element) * kBytes));
    return Vec::widen(Kind<dtype>{}, part);
  }
};

// A panel [padded][kPanel] of columns: a block of registers reads neighbours. Here kLanes of them, of which
// some may not be there.
template <class From>
inline void pack_part(const ChunkTask& task, int64_t column, float* panel) {
  for (int64_t d = 0; d < task.padded; d += kLanes) {
    Vec lines[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const bool there = column + i >= task.first && column + i < task.columns && d < task.size;
      lines[i] = there ? From::load(task.keys[column + i], d, task.size) : Vec::zero();
    }
    transpose(lines);
    for (int64_t i = 0; i < kLanes; ++i) lines[i].store(panel + (d + i) * kPanel);
  }
}

// All of them, with all their elements.
template <class From>
inline void pack_whole(const void* const* keys, const void* const* ahead, int64_t size, float* panel) {
  constexpr int64_t kStep = From::kPairs ? 2 * kLanes : kLanes;  // elements of a vector as it is loaded
  for (int64_t d = 0; d < size; d += kStep) {
    Vec lines[kLanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) {
      lines[i] = From::load_raw(keys[i], d);
      __builtin_prefetch(From::at(ahead[i], d));
    }
    transpose(lines);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) {
      if constexpr (From::kPairs) {
        lower_bfloat(lines[i]).store(panel + (d + 2 * i) * kPanel);
        upper_bfloat(lines[i]).store(panel + (d + 2 * i + 1) * kPanel);
      } else {
        lines[i].store(panel + (d + i) * kPanel);
      }
    }
  }
}

template <class From>
void pack_keys(const ChunkTask& task, int64_t first, float* panel) {
  constexpr int64_t kStep = From::kPairs ? 2 * kLanes : kLanes;
  const bool whole_rows = task.size % kStep == 0 && task.size == task.padded;
  for (int64_t part = 0; part < kPanel; part += kLanes) {
    const int64_t column = first + part;
    if (!whole_rows || column < task.first || column + kLanes > task.columns) {
      pack_part<From>(task, column, panel + part);
      continue;
    }
    const bool more = column + kPanel + kLanes <= task.columns;
    pack_whole<From>(task.keys + column, task.keys + column + (more ? kPanel : 0), task.size, panel + part);
  }
}

// Columns whose values are not finite and that only some rows see: left out of the products, and added one by
// one.
struct OddColumns {
  int16_t column[kAttentionChunk];
  int64_t count = 0;
};

// Panels [padded / kPanel][kAttentionChunk][kPanel], the last one as narrow as it has to be; `at` is the
// column's place in them.
template <class From>
inline void pack_value(const ChunkTask& task, int64_t column, bool there, int64_t at, float* panels) {
  const void* row = task.values[there ? column : task.first];
  const int64_t whole = there ? task.size / kPanel * kPanel : 0;
  float* to = panels + at * kPanel;
  for (int64_t d = 0; d < whole; d += kPanel, to += kAttentionChunk * kPanel) {
    From::load(row, d).store(to);
    From::load(row, d + kLanes).store(to + kLanes);
  }
  for (int64_t d = whole; d < task.padded; d += kLanes) {
    const int64_t panel = d / kPanel * kPanel, width = std::min(kPanel, task.padded - panel);
    const Vec line = there && d < task.size ? From::load(row, d, task.size) : Vec::zero();
    line.store(panels + panel * kAttentionChunk + at * width + d - panel);
  }
}

template <class From>
inline bool is_finite(const void* row, int64_t size) {
  Vec zeros = Vec::zero();  // 0 * x, summed: NaN if an element is not finite
  for (int64_t d = 0; d < size; d += kLanes)
    zeros = multiply_add(From::load(row, d, size), Vec::zero(), zeros);
  return sum_of(zeros) == 0.0f;
}

template <class From>
void pack_values(const ChunkTask& task, int64_t begin, int64_t end, int64_t at, float* panels,
                 OddColumns& odd) {
  constexpr int64_t kAhead = 12, kLine = 64 / From::kBytes;
  for (int64_t column = begin; column < end; ++column) {
    bool there = column >= task.first;
    if (there && column + kAhead < task.columns) {
      for (int64_t d = 0; d < task.size; d += kLine)
        __builtin_prefetch(From::at(task.values[column + kAhead], d));
    }
    if (there && task.seen != nullptr && column >= task.mask_from) {
      there = is_finite<From>(task.values[column], task.size);
      if (!there) odd.column[odd.count++] = static_cast<int16_t>(column);
    }
    pack_value<From>(task, column, there, at + column - begin, panels);
  }
}

}  // namespace

}  // namespace foretoken::cpu

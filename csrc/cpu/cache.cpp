#include "cpu/cache.hpp"

#include <cstring>
#include <vector>

#include "cpu/parallel.hpp"
#include "cpu/views.hpp"
#include "math/float8.hpp"
#include "ops/sampling.hpp"

namespace foretoken::cpu {

namespace {

// --- append ---

template <class Format, DType kFrom>
void narrow(const char* from, uint8_t* to, int64_t count, float scale) {
  for (int64_t i = 0; i < count; ++i) {
    float value = 0.0f;
    if constexpr (kFrom == DType::float32) {
      value = reinterpret_cast<const float*>(from)[i];
    } else if constexpr (kFrom == DType::bfloat16) {
      value = float_of_bfloat(reinterpret_cast<const uint16_t*>(from)[i]);
    } else {
      value = float_of_half(reinterpret_cast<const uint16_t*>(from)[i]);
    }
    to[i] = static_cast<uint8_t>(float8_of<Format>(value / scale));
  }
}

using Narrow = void (*)(const char*, uint8_t*, int64_t, float);

template <class Format>
Narrow narrowing_from(DType from) {
  switch (from) {
    case DType::float32: return &narrow<Format, DType::float32>;
    case DType::bfloat16: return &narrow<Format, DType::bfloat16>;
    default: return &narrow<Format, DType::float16>;
  }
}

void write_row(const AppendHalf& half, int64_t b, int64_t t, CachePlace place) {
  const TensorView &rows = half.rows, &cache = half.cache;
  const int64_t size = rows.shape[3], element = bytes_of(rows.dtype), stored = bytes_of(cache.dtype);
  const Narrow narrowed =
      cache.dtype == DType::float8_e4m3 ? narrowing_from<E4M3>(rows.dtype) : narrowing_from<E5M2>(rows.dtype);
  for (int64_t head = 0; head < rows.shape[2]; ++head) {
    const char* const from = static_cast<const char*>(rows.data) +
                             (b * rows.strides[0] + t * rows.strides[1] + head * rows.strides[2]) * element;
    char* const to =
        static_cast<char*>(cache.data) +
        (place.page * cache.strides[0] + place.row * cache.strides[1] + head * cache.strides[2]) * stored;
    if (rows.dtype == cache.dtype) {
      std::memcpy(to, from, static_cast<size_t>(size * element));
      continue;
    }
    const float scale =
        half.scale ? static_cast<const float*>(half.scale.data)[head * half.scale.strides[0]] : 1.0f;
    narrowed(from, reinterpret_cast<uint8_t*>(to), size, scale);
  }
}

// Rows of request b to write, -1 if they do not fit.
int64_t count_of(const AppendArgs& args, int64_t b) {
  const CachePages& pages = args.pages;
  const int64_t most = args.halves[0].rows.shape[1], length = integer_at(args.lengths, b);
  const int64_t count = args.num_nodes ? integer_at(args.num_nodes, b) : most;
  if (count <= 0) return 0;
  if (count > most || !within(pages, length, count)) return -1;
  const int64_t last = column_of(pages, length + count - 1);
  for (int64_t column = column_of(pages, length); column <= last; ++column) {
    if (page_at(pages, b, column) < 0) return -1;
  }
  return count;
}

// --- compact ---

// Where the row of a node is and where it goes, for the nodes of a request's path that are not in place.
struct Move {
  CachePlace from, to;
};

bool moves_of(const CompactArgs& args, int64_t b, std::vector<Move>& moves) {
  moves.clear();
  const CachePages& pages = args.pages;
  const int64_t accepted = integer_at(args.num_accepted, b), length = integer_at(args.lengths, b);
  if (accepted == 0) return true;
  if (accepted < 0 || accepted > args.path.shape[1] || !within(pages, length, 1)) return false;
  int64_t before = 0;
  for (int64_t i = 0; i < accepted; ++i) {
    const int64_t node = integer_at(args.path, b, i);
    if (node <= before || node >= pages.capacity - length) return false;
    const Move move{place_of(pages, b, length + node), place_of(pages, b, length + 1 + i)};
    if (move.from.page < 0 || move.to.page < 0) return false;
    if (node > i + 1) moves.push_back(move);
    before = node;
  }
  return true;
}

// In ascending order: node numbers ascend, so no row is written before it has been read.
void move_rows(const CacheTensor& tensor, const std::vector<Move>& moves) {
  const auto row_at = [&](CachePlace place) {
    return tensor.data + place.page * tensor.page_stride + place.row * tensor.row_stride;
  };
  for (const Move& move : moves) {
    const char* const from = row_at(move.from);
    char* const to = row_at(move.to);
    for (int64_t part = 0; part < tensor.parts; ++part) {
      std::memcpy(to + part * tensor.part_stride, from + part * tensor.part_stride,
                  static_cast<size_t>(tensor.part_bytes));
    }
  }
}

}  // namespace

void append(const AppendArgs& args) {
  const TensorView &keys = args.halves[0].rows, &values = args.halves[1].rows;
  const int64_t batch = keys.shape[0], most = keys.shape[1];
  std::vector<int64_t> counts(static_cast<size_t>(batch));
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t count = count_of(args, b);
    write_index(args.status, count < 0 ? kBadRow : 0, b);
    counts[static_cast<size_t>(b)] = count;
  }
  parallel_for(batch * most, keys.shape[2] * (keys.shape[3] + values.shape[3]), [&](int64_t item) {
    const int64_t b = item / most, t = item % most;
    if (t >= counts[static_cast<size_t>(b)]) return;
    const CachePlace place = place_of(args.pages, b, integer_at(args.lengths, b) + t);
    for (const AppendHalf& half : args.halves) write_row(half, b, t, place);
  });
}

void compact(const CompactArgs& args) {
  const int64_t batch = args.path.shape[0];
  std::vector<std::vector<Move>> moves(static_cast<size_t>(batch));
  size_t most = 0;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<Move>& mine = moves[static_cast<size_t>(b)];
    const bool usable = moves_of(args, b, mine);
    write_index(args.status, usable ? 0 : kBadRow, b);
    if (!usable) mine.clear();
    most = mine.size() > most ? mine.size() : most;
  }
  if (most == 0) return;
  constexpr int64_t kBytesPerElement = 4;  // copied in the time that parallel_for reckons with
  const CacheTensor& first = args.tensors[0];
  const int64_t work = static_cast<int64_t>(most) * first.parts * first.part_bytes / kBytesPerElement;
  parallel_for(batch * args.num_tensors, work, [&](int64_t item) {
    move_rows(args.tensors[item % args.num_tensors], moves[static_cast<size_t>(item / args.num_tensors)]);
  });
}

}  // namespace foretoken::cpu

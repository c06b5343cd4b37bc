#include "cuda/cache.hpp"

#include <algorithm>

#include "cuda/errors.hpp"
#include "cuda/views.cuh"
#include "math/float8.hpp"
#include "ops/sampling.hpp"

namespace foretoken::cuda {

namespace {

constexpr int kLanes = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int64_t kMostBlocksAcross = 65535;  // in the second dimension of a grid

// --- append ---

constexpr int kAppendThreads = 128;
constexpr int kGroup = 8;  // elements that a thread makes 8-bit floats of at a time

// How a block's threads share a row of K or V.
struct RowShare {
  int32_t columns = 0, per_head = 0;
  int32_t width = 0;  // elements of a column
};

struct AppendLaunch {
  AppendArgs args;
  RowShare shares[2];
};

template <class Word>
__device__ void copy_word(char* to, const char* from) {
  *reinterpret_cast<Word*>(to) = *reinterpret_cast<const Word*>(from);
}

__device__ void copy_bytes(char* to, const char* from, int64_t bytes) {
  switch (bytes) {
    case 16: return copy_word<uint4>(to, from);
    case 8: return copy_word<uint2>(to, from);
    case 4: return copy_word<uint32_t>(to, from);
    case 2: return copy_word<uint16_t>(to, from);
    default: return copy_word<uint8_t>(to, from);
  }
}

__device__ float float_at(const char* from, DType dtype) {
  if (dtype == DType::float32) return *reinterpret_cast<const float*>(from);
  const uint32_t bits = *reinterpret_cast<const uint16_t*>(from);
  return dtype == DType::bfloat16 ? float_of_bfloat(bits) : float_of_half(bits);
}

__device__ uint32_t narrowed(float value, float scale, DType to) {
  const float scaled = __fdiv_rn(value, scale);
  return to == DType::float8_e4m3 ? float8_of<E4M3>(scaled) : float8_of<E5M2>(scaled);
}

// Eight aligned elements.
__device__ void narrow_group(char* to, const char* from, DType from_dtype, float scale, DType to_dtype) {
  const int words = from_dtype == DType::float32 ? 2 : 1;
  uint4 held[2] = {};
  held[0] = reinterpret_cast<const uint4*>(from)[0];
  if (words == 2) held[1] = reinterpret_cast<const uint4*>(from)[1];
  const uint32_t bits[kGroup] = {held[0].x, held[0].y, held[0].z, held[0].w,
                                 held[1].x, held[1].y, held[1].z, held[1].w};
  uint32_t packed[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    float value;
    if (words == 2) {
      value = float_of(bits[i]);
    } else {
      const uint32_t half = bits[i / 2] >> (i % 2 * 16) & 0xFFFFu;
      value = from_dtype == DType::bfloat16 ? float_of_bfloat(half) : float_of_half(half);
    }
    packed[i / 4] |= narrowed(value, scale, to_dtype) << (i % 4 * 8);
  }
  *reinterpret_cast<uint2*>(to) = make_uint2(packed[0], packed[1]);
}

__device__ void write_column(const AppendHalf& half, const RowShare& share, int64_t b, int64_t t,
                             CachePlace place, int32_t column) {
  const TensorView &rows = half.rows, &cache = half.cache;
  const int64_t head = column / share.per_head, inside = int64_t{column % share.per_head} * share.width;
  const int64_t source = b * rows.strides[0] + t * rows.strides[1] + head * rows.strides[2] + inside;
  const int64_t target =
      place.page * cache.strides[0] + place.row * cache.strides[1] + head * cache.strides[2] + inside;
  const int64_t element = bytes_of(rows.dtype);
  const char* const from = static_cast<const char*>(rows.data) + source * element;
  char* const to = static_cast<char*>(cache.data) + target * bytes_of(cache.dtype);
  if (rows.dtype == cache.dtype) return copy_bytes(to, from, share.width * element);
  const float scale =
      half.scale ? static_cast<const float*>(half.scale.data)[head * half.scale.strides[0]] : 1.0f;
  if (share.width == kGroup) return narrow_group(to, from, rows.dtype, scale, cache.dtype);
  *reinterpret_cast<uint8_t*>(to) =
      static_cast<uint8_t>(narrowed(float_at(from, rows.dtype), scale, cache.dtype));
}

// Rows of request b to write, -1 if they do not fit; the same for all threads, each of which calls this.
__device__ int64_t count_of(const AppendArgs& args, int64_t b, int64_t length) {
  const CachePages& pages = args.pages;
  const int64_t most = args.halves[0].rows.shape[1];
  const int64_t count = args.num_nodes ? integer_at(args.num_nodes, b) : most;
  const bool inside = count <= most && within(pages, length, count);
  bool missing = false;
  if (count > 0 && inside) {
    const int64_t last = column_of(pages, length + count - 1);
    for (int64_t column = column_of(pages, length) + threadIdx.x; column <= last; column += kAppendThreads) {
      missing = missing || page_at(pages, b, column) < 0;
    }
  }
  const bool any_missing = __syncthreads_or(missing) != 0;
  if (count <= 0) return 0;
  return inside && !any_missing ? count : -1;
}

// A block for a row of K and V, of request blockIdx.x.
__global__ void __launch_bounds__(kAppendThreads) append_kernel(const __grid_constant__ AppendLaunch launch) {
  const AppendArgs& args = launch.args;
  const int64_t b = blockIdx.x;
  const int64_t length = integer_at(args.lengths, b);
  const int64_t count = count_of(args, b, length);
  if (blockIdx.y == 0 && threadIdx.x == 0) write_index(args.status, count < 0 ? kBadRow : 0, b);
  const int32_t keys = launch.shares[0].columns, columns = keys + launch.shares[1].columns;
  for (int64_t t = blockIdx.y; t < count; t += gridDim.y) {
    const CachePlace place = place_of(args.pages, b, length + t);
    for (int32_t column = static_cast<int32_t>(threadIdx.x); column < columns; column += kAppendThreads) {
      const int half = column < keys ? 0 : 1;
      write_column(args.halves[half], launch.shares[half], b, t, place, half == 0 ? column : column - keys);
    }
  }
}

// Whether columns of so many bytes start at multiples of them, wherever the row.
bool aligned(const TensorView& view, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(bytes) != 0) return false;
  for (int dim = 0; dim < 3; ++dim) {
    if (view.shape[dim] > 1 && view.strides[dim] * bytes_of(view.dtype) % bytes != 0) return false;
  }
  return true;
}

RowShare share_of(const AppendHalf& half) {
  const int64_t size = half.rows.shape[3], element = bytes_of(half.rows.dtype);
  int64_t width = 1;
  if (half.rows.dtype != half.cache.dtype) {
    if (size % kGroup == 0 && aligned(half.rows, 16) && aligned(half.cache, kGroup)) width = kGroup;
  } else {
    for (int64_t bytes = 16; bytes > element && width == 1; bytes /= 2) {
      if (size * element % bytes == 0 && aligned(half.rows, bytes) && aligned(half.cache, bytes))
        width = bytes / element;
    }
  }
  RowShare share;
  share.width = static_cast<int32_t>(width);
  share.per_head = static_cast<int32_t>(size / width);
  share.columns = static_cast<int32_t>(half.rows.shape[2] * share.per_head);
  return share;
}

// --- compact ---

constexpr int kUnitsPerBlock = 2;  // a warp each; small, so that one request's rows reach all multiprocessors
constexpr int kHeld = 8;           // rows that a thread has read and not yet written
constexpr int kBlocksAtOnce = 16;  // of a multiprocessor

// Where rows are and where they go, in bytes behind the tensor's data.
struct Moves {
  int64_t from[kMostPathNodes], to[kMostPathNodes];
};

__device__ int64_t offset_in(const CacheUnit& unit, CachePlace place) {
  return place.page * unit.page_stride + place.row * unit.row_stride;
}

// How many rows move, -1 if the path is unusable; by a whole warp, with room for all of the path's moves.
__device__ int list_moves(const CompactArgs& args, const CacheUnit& unit, int64_t b, int lane, Moves& moves) {
  const int64_t columns = args.path.shape[1], capacity = args.pages.capacity;
  const int64_t length = integer_at(args.lengths, b), accepted = integer_at(args.num_accepted, b);
  bool usable = accepted >= 0 && accepted <= columns;
  int count = 0;
  int64_t i = lane;
#pragma unroll 1
  do {  // the path is read before the number of its nodes is known: one wait instead of two
    const int64_t node = i < columns ? integer_at(args.path, b, i) : 0;
    const int64_t before = i > 0 && i < columns ? integer_at(args.path, b, i - 1) : 0;
    const bool there = usable && i < accepted;
    CachePlace from, to;
    if (there && length >= 0 && length < capacity && node > before && node < capacity - length) {
      from = place_of(args.pages, b, length + node);
      to = place_of(args.pages, b, length + 1 + i);
    }
    usable = __all_sync(kWholeWarp, !there || (from.page >= 0 && to.page >= 0)) != 0 && usable;
    const bool moving = usable && there && node > i + 1;
    const unsigned who = __ballot_sync(kWholeWarp, moving);
    const int place = count + __popc(who & ((1u << lane) - 1u));
    if (moving) moves.from[place] = offset_in(unit, from);
    if (moving) moves.to[place] = offset_in(unit, to);
    count += __popc(who);
    i += kLanes;
  } while (usable && i - lane < accepted);
  return usable ? count : -1;
}

// Node numbers ascend, so nothing is written before its owner, this thread, has read it.
template <class Word>
__device__ void move_column(char* column, const Moves& moves, int count) {
#pragma unroll 1
  for (int first = 0; first < count; first += kHeld) {
    Word held[kHeld] = {};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i < count) held[i] = __ldcg(reinterpret_cast<const Word*>(column + moves.from[first + i]));
    }
    asm volatile("" ::: "memory");  // targets are looked up after the reads, or they would fill registers
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i < count) __stcg(reinterpret_cast<Word*>(column + moves.to[first + i]), held[i]);
    }
  }
}

__device__ void move_rows(const CacheUnit& unit, const Moves& moves, int count, int lane) {
  const int32_t at = unit.first + lane;
  char* const column =
      unit.data + at / unit.per_part * unit.part_stride + int64_t{at % unit.per_part} * unit.width;
  switch (unit.width) {
    case 16: return move_column<uint4>(column, moves, count);
    case 8: return move_column<uint2>(column, moves, count);
    case 4: return move_column<unsigned>(column, moves, count);
    case 2: return move_column<unsigned short>(column, moves, count);
    default: return move_column<unsigned char>(column, moves, count);
  }
}

// A warp for a unit of request blockIdx.x.
__global__ void __launch_bounds__(kLanes* kUnitsPerBlock, kBlocksAtOnce)
    compact_kernel(const __grid_constant__ CompactArgs args) {
  __shared__ Moves moves[kUnitsPerBlock];
  const int64_t b = blockIdx.x;
  const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  int64_t index = static_cast<int64_t>(blockIdx.y) * kUnitsPerBlock + warp;
  for (; index < args.num_units;
       index += int64_t{gridDim.y} * kUnitsPerBlock) {  // the same for the whole warp
    const CacheUnit unit = args.units[index];
    const int count = list_moves(args, unit, b, lane, moves[warp]);
    if (index == 0 && lane == 0) write_index(args.status, count < 0 ? kBadRow : 0, b);
    __syncwarp();
    if (lane < unit.count) move_rows(unit, moves[warp], count, lane);
    __syncwarp();  // all have done with the moves
  }
}

unsigned across(int64_t blocks) {
  return static_cast<unsigned>(std::max<int64_t>(1, std::min(blocks, kMostBlocksAcross)));
}

}  // namespace

void append(const AppendArgs& args, Stream stream) {
  const TensorView& keys = args.halves[0].rows;
  if (keys.shape[0] == 0) return;
  const AppendLaunch launch{args, {share_of(args.halves[0]), share_of(args.halves[1])}};
  const dim3 grid(static_cast<unsigned>(keys.shape[0]), across(keys.shape[1]));
  append_kernel<<<grid, kAppendThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(launch);
  throw_if_failed(cudaGetLastError(), "append");
}

void compact(const CompactArgs& args, Stream stream) {
  const int64_t batch = args.path.shape[0];
  if (batch == 0) return;
  const dim3 grid(static_cast<unsigned>(batch),
                  across((args.num_units + kUnitsPerBlock - 1) / kUnitsPerBlock));
  compact_kernel<<<grid, kLanes * kUnitsPerBlock, 0, static_cast<cudaStream_t>(stream.handle)>>>(args);
  throw_if_failed(cudaGetLastError(), "compact");
}

}  // namespace foretoken::cuda

// Tree attention for what the matrix units do not serve: float32, odd head sizes, layouts of any alignment.
#pragma once

#include "cuda/tree_attention_real.cuh"
#include "cuda/tree_attention_rows.cuh"
#include "cuda/views.cuh"

namespace foretoken::cuda::attend {

constexpr int kPlainRows = 16;
constexpr int kPlainThreads = 256;
constexpr int kPlainLanes = kPlainThreads / kPlainRows;  // of a row
constexpr int kPlainColumns = 256 / kPlainLanes;

// The task's tensors with what it does not say of them.
struct PlainTask {
  Task task;
  TensorView q, k_cache, v_cache, out;
};

// Tiles and queries as float32: a tile of K or V, the queries, the weights.
inline int64_t plain_shared_bytes(int64_t head_size) {
  return 4 * (kTile * (head_size + 1) + kPlainRows * head_size + kPlainRows * kTile);
}

__device__ inline float sum_of_row(float value) {
#pragma unroll
  for (int reach = kPlainLanes / 2; reach > 0; reach /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, reach);
  return value;
}
__device__ inline float max_of_row(float value) {
#pragma unroll
  for (int reach = kPlainLanes / 2; reach > 0; reach /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, reach));
  }
  return value;
}

// Nodes that do not exist, and rows that cannot be served.
__device__ inline void fill_plain_rest(const PlainTask& all) {
  const Task& task = all.task;
  const int64_t b = blockIdx.x;
  const RowShape row = row_shape(task, b);
  const int from = row.usable ? row.nodes : 0, heads = task.group * task.kv_heads;
  const float value = row.usable ? 0.0f : __int_as_float(0x7fffffff);
  const int64_t results = static_cast<int64_t>(task.nodes - from) * heads;
  for (int64_t i = threadIdx.x; i < results; i += kPlainThreads) {
    const int64_t node = from + i / heads, head = i % heads, offset = offset_of(all.out, b, node, head);
    for (int d = 0; d < task.head_size; ++d) write_real(all.out, offset + d, value);
    if (task.lse) {
      task.lse[b * task.lse_row + node * task.lse_node + head * task.lse_head] =
          row.usable ? minus_infinity() : value;
    }
  }
}

// A block for 16 queries of a row and kv head: 16 lanes each, which share its scores and its columns.
class PlainBlock {
 public:
  __device__ PlainBlock(const PlainTask& all, float* shared, Queries& queries, int b, int head, int block)
      : all_(all),
        task_(all.task),
        size_(task_.head_size),
        tile_(shared),
        q_(shared + kTile * (size_ + 1)),
        weights_(q_ + kPlainRows * size_),
        queries_(queries),
        thread_(static_cast<int>(threadIdx.x)),
        row_(thread_ / kPlainLanes),
        lane_(thread_ % kPlainLanes) {
    at_.row = row_shape(task_, b);
    at_.piece.b = b;
    at_.piece.head = head;
    at_.first_query = block * kPlainRows;
    at_.queries = at_.row.nodes * task_.group;
  }

  __device__ void run() {
    if (!at_.row.usable || !at_.active()) return;  // the same for the whole block
    if (thread_ < kPlainRows) take_sight(task_, at_, queries_, thread_);
    for (int i = thread_; i < kPlainRows * size_; i += kPlainThreads)
      q_[i] = query_element(i / size_, i % size_);
    const float k_scale = task_.k_scale ? task_.k_scale[at_.piece.head * task_.k_scale_head] : 1.0f;
    for (int tile = at_.row.first; tile < at_.row.end; ++tile) add_tile(tile, task_.scale * k_scale);
    write();
  }

 private:
  __device__ float query_element(int row, int column) const {
    const int query = at_.first_query + row;
    if (query >= at_.queries) return 0.0f;
    return read_real(all_.q, offset_of(all_.q, at_.piece.b, query / task_.group,
                                       at_.piece.head * task_.group + query % task_.group) +
                                 column);
  }

  __device__ void load(const TensorView& cache, int tile) {
    const int64_t begin = static_cast<int64_t>(at_.row.first) * kTile;
    for (int i = thread_; i < kTile * size_; i += kPlainThreads) {
      const int slot = i / size_;
      const Place place =
          locate(task_, at_.piece.b, static_cast<int64_t>(tile) * kTile + slot, begin, at_.row.slots());
      float value = place.page == kBadPage ? __int_as_float(0x7fffffff) : 0.0f;
      if (place.page >= 0) {
        value = read_real(cache, offset_of(cache, place.page, place.within, at_.piece.head) + i % size_);
      }
      tile_[slot * (size_ + 1) + i % size_] = value;
    }
  }

  __device__ void add_tile(int tile, float scale) {
    __syncthreads();
    load(all_.k_cache, tile);
    __syncthreads();
    const uint64_t seen = sight_of(at_, queries_, row_, tile);
    float scores[kTile / kPlainLanes], high = minus_infinity();
#pragma unroll
    for (int i = 0; i < kTile / kPlainLanes; ++i) {
      const int slot = lane_ + kPlainLanes * i;
      scores[i] = minus_infinity();
      if ((seen >> slot & 1u) == 0) continue;
      const float *const query = q_ + row_ * size_, *const key = tile_ + slot * (size_ + 1);
      float sums[4] = {};
      int d = 0;
      for (; d + 4 <= size_; d += 4) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] = __fmaf_rn(query[d + j], key[d + j], sums[j]);
      }
      for (; d < size_; ++d) sums[0] = __fmaf_rn(query[d], key[d], sums[0]);
      const float product = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      scores[i] = product * scale;
      if (task_.softcap > 0.0f) scores[i] = task_.softcap * tanhf(scores[i] / task_.softcap);
      high = fmaxf(high, scores[i]);
    }
    const float max = fmaxf(max_, max_of_row(high)), reference = max == minus_infinity() ? 0.0f : max;
    const float factor = expf(max_ - reference);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kTile / kPlainLanes; ++i) {
      const float weight = expf(scores[i] - reference);
      weights_[row_ * kTile + lane_ + kPlainLanes * i] = weight;
      sum += weight;
    }
    max_ = max;
    sum_ = __fmaf_rn(sum_, factor, sum_of_row(sum));
    __syncthreads();
    load(all_.v_cache, tile);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPlainColumns; ++i) {
      const int column = lane_ + kPlainLanes * i;
      if (column >= size_) break;
      float value = 0.0f;
      for (int slot = 0; slot < kTile; ++slot) {
        if ((seen >> slot & 1u) == 0) continue;  // it may be NaN
        value = __fmaf_rn(weights_[row_ * kTile + slot], tile_[slot * (size_ + 1) + column], value);
      }
      values_[i] = __fmaf_rn(values_[i], factor, value);
    }
  }

  __device__ void write() const {
    const int query = at_.first_query + row_;
    if (query >= at_.queries) return;
    const int node = query / task_.group, head = at_.piece.head * task_.group + query % task_.group;
    float weight = 1.0f, sum = sum_, max = max_;
    if (task_.sinks) {
      const float sink = task_.sinks[head * task_.sinks_head], top = fmaxf(max, sink);
      const float reference = top == minus_infinity() ? 0.0f : top;
      weight = expf(max - reference);
      sum = sum * weight + expf(sink - reference);
      max = top;
    }
    const float scale = task_.v_scale ? task_.v_scale[at_.piece.head * task_.v_scale_head] : 1.0f;
    const float factor = sum == 0.0f ? 0.0f : weight * scale / sum;
    const int64_t offset = offset_of(all_.out, at_.piece.b, node, head);
#pragma unroll
    for (int i = 0; i < kPlainColumns; ++i) {
      const int column = lane_ + kPlainLanes * i;
      if (column < size_) write_real(all_.out, offset + column, values_[i] * factor);
    }
    if (task_.lse && lane_ == 0) {
      task_.lse[at_.piece.b * task_.lse_row + node * task_.lse_node + head * task_.lse_head] =
          sum == 0.0f ? minus_infinity() : max + logf(sum);
    }
  }

  const PlainTask& all_;
  const Task& task_;
  const int size_;
  float *const tile_, *const q_, *const weights_;
  Queries& queries_;
  const int thread_, row_, lane_;
  TeamPiece at_;
  float max_ = minus_infinity(), sum_ = 0.0f, values_[kPlainColumns] = {};
};

}  // namespace foretoken::cuda::attend

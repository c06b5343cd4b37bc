// Reading and writing elements of a view in a kernel.
#pragma once

#include "ops/tensor_view.hpp"

namespace foretoken::cuda {

__device__ inline int64_t offset_of(const TensorView& view, int64_t i, int64_t j = 0, int64_t k = 0) {
  int64_t offset = i * view.strides[0];
  if (view.rank > 1) offset += j * view.strides[1];
  if (view.rank > 2) offset += k * view.strides[2];
  return offset;
}

__device__ inline int64_t read_index(const TensorView& view, int64_t i, int64_t j = 0, int64_t k = 0) {
  const int64_t offset = offset_of(view, i, j, k);
  return view.dtype == DType::int64 ? static_cast<const int64_t*>(view.data)[offset]
                                    : static_cast<const int32_t*>(view.data)[offset];
}

__device__ inline void write_index(const TensorView& view, int64_t value, int64_t i, int64_t j = 0,
                                   int64_t k = 0) {
  const int64_t offset = offset_of(view, i, j, k);
  if (view.dtype == DType::int64) {
    static_cast<int64_t*>(view.data)[offset] = value;
  } else {
    static_cast<int32_t*>(view.data)[offset] = static_cast<int32_t>(value);
  }
}

__device__ inline void write_float(const TensorView& view, float value, int64_t i, int64_t j = 0,
                                   int64_t k = 0) {
  static_cast<float*>(view.data)[offset_of(view, i, j, k)] = value;
}

// The sampling slot of row b, or -1 if the table has no such slot.
__device__ inline int64_t slot_of(const TensorView& slots, int64_t b, int64_t size) {
  const int64_t slot = slots ? read_index(slots, b) : b;
  return slot >= 0 && slot < size ? slot : -1;
}

}  // namespace foretoken::cuda

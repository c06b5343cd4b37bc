// Reading and writing elements of a view in a kernel.
#pragma once

#include "ops/tensor_view.hpp"

namespace foretoken::cuda {

__device__ inline int64_t read_index(const TensorView& view, int64_t i) {
  const int64_t offset = i * view.strides[0];
  return view.dtype == DType::int64 ? static_cast<const int64_t*>(view.data)[offset]
                                    : static_cast<const int32_t*>(view.data)[offset];
}

__device__ inline void write_index(const TensorView& view, int64_t value, int64_t i) {
  const int64_t offset = i * view.strides[0];
  if (view.dtype == DType::int64) {
    static_cast<int64_t*>(view.data)[offset] = value;
  } else {
    static_cast<int32_t*>(view.data)[offset] = static_cast<int32_t>(value);
  }
}

}  // namespace foretoken::cuda

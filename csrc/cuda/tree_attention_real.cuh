// Elements of any floating dtype, one at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "math/float8.hpp"
#include "ops/tensor_view.hpp"

namespace foretoken::cuda::attend {

__device__ inline float read_real(const TensorView& view, int64_t offset) {
  switch (view.dtype) {
    case DType::bfloat16: return float_of_bfloat(static_cast<const uint16_t*>(view.data)[offset]);
    case DType::float16: return float_of_half(static_cast<const uint16_t*>(view.data)[offset]);
    case DType::float8_e4m3: return float_of_e4m3(static_cast<const uint8_t*>(view.data)[offset]);
    case DType::float8_e5m2: return float_of_e5m2(static_cast<const uint8_t*>(view.data)[offset]);
    default: return static_cast<const float*>(view.data)[offset];
  }
}

__device__ inline void write_real(const TensorView& view, int64_t offset, float value) {
  switch (view.dtype) {
    case DType::bfloat16:
      static_cast<uint16_t*>(view.data)[offset] = __bfloat16_as_ushort(__float2bfloat16_rn(value));
      return;
    case DType::float16:
      static_cast<uint16_t*>(view.data)[offset] = __half_as_ushort(__float2half_rn(value));
      return;
    default: static_cast<float*>(view.data)[offset] = value;
  }
}

}  // namespace foretoken::cuda::attend

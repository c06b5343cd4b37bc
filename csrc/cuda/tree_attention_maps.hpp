// Tensors as Hopper's copy engine takes them.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "ops/tensor_view.hpp"

namespace foretoken::cuda::attend {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, null if it has none: this library does not link with it.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &status);
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess && status == cudaDriverEntryPointSuccess
               ? reinterpret_cast<EncodeTiled>(function)
               : nullptr;
  }();
  return found;
}

// Boxes of `columns` columns of `slots` slots of a cache [pages, slots, heads, size]; those of 16 bits are
// permuted as the matrix units expect. False: it cannot be told.
inline bool encode_cache(const TensorView& cache, int columns, int slots, CUtensorMap& map) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return false;
  const auto extent = [&](int dim) { return static_cast<cuuint64_t>(cache.shape[dim]); };
  const auto stride = [&](int dim) {  // of a dimension of one element it does not matter
    return cache.shape[dim] > 1 ? static_cast<cuuint64_t>(cache.strides[dim] * bytes_of(cache.dtype)) : 16;
  };
  const cuuint64_t sizes[] = {extent(3), extent(1), extent(2), extent(0)};
  const cuuint64_t strides[] = {stride(1), stride(2), stride(0)};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(slots), 1, 1};
  for (const cuuint64_t apart : strides) {
    if (apart == 0 || apart >= cuuint64_t{1} << 40) return false;
  }
  const bool bytes = bytes_of(cache.dtype) == 1;
  const auto type = bytes                            ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                    : cache.dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                     : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(&map, type, 4, cache.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                bytes ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace foretoken::cuda::attend

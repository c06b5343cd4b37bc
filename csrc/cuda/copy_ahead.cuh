// Copies from global into shared memory that are on their way while a thread goes on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace foretoken::cuda {

// Sixteen bytes, aligned to as many.
__device__ __forceinline__ void copy_ahead(void* shared, const void* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
#endif
}

// What this thread has asked for since the last one becomes a group.
__device__ __forceinline__ void close_group() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until no more than the last `kLeft` groups of this thread are on their way.
template <int kLeft>
__device__ __forceinline__ void wait_for_groups() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

}  // namespace foretoken::cuda

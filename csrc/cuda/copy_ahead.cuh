// Copies from global memory by the copy engine, that are on their way while their warp goes on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace foretoken::cuda {

// In shared memory; of one copy at a time.
using CopyBarrier = uint64_t;

// By the thread that asks for the copy, and behind all of its barriers barriers_begun(); others may wait
// behind a barrier of their own with it.
__device__ __forceinline__ void begin_barrier(CopyBarrier* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier)))
      : "memory");
#endif
}
__device__ __forceinline__ void barriers_begun() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// `bytes`, a multiple of sixteen, between addresses that are ones too. By one thread.
__device__ __forceinline__ void copy_ahead(void* shared, const void* global, uint32_t bytes,
                                           CopyBarrier* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared)),
                 behind = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(behind),
      "r"(bytes)
      : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(global), "r"(bytes), "r"(behind)
      : "memory");
#endif
}

// For the first copy or the one after it, and so on by turns: `turn` is 0 or 1. By each thread that reads
// what comes; again at no cost.
__device__ __forceinline__ void wait_for_copy(CopyBarrier* barrier, uint32_t turn) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t behind = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  uint32_t there = 0;
  while (there == 0) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(there)
        : "r"(behind), "r"(turn)
        : "memory");
  }
#endif
}

// The same bytes only as near as the second-level cache.
__device__ __forceinline__ void bring_closer(const void* global, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#endif
}

}  // namespace foretoken::cuda

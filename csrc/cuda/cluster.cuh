// A cluster of blocks that share one row: its barrier, and what each block tells all others. Without clusters
// (before sm_90) a row has one block, and the same code runs with a cluster of one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace foretoken::cuda {

constexpr int kMaxCluster = 16;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Also a barrier of the block, and orders its shared memory, its neighbours' and global memory.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same variable in the shared memory of another block of the cluster.
template <class T>
__device__ inline T* of_block(T* shared, uint32_t rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(address);
}

#else

__device__ inline uint32_t cluster_rank() { return 0; }
__device__ inline uint32_t cluster_size() { return 1; }
__device__ inline void cluster_sync() { __syncthreads(); }
template <class T>
__device__ inline T* of_block(T* shared, uint32_t) {
  return shared;
}

#endif

// Everyone's contribution, combined; the same value in every thread of the cluster. `combine` has to be exact
// in any order: maxima, integer sums. One barrier of the cluster; calls in a row need two `slots` in turn.
template <class T, class Combine>
__device__ inline T combine_cluster(T mine, T neutral, Combine combine, T (&warps)[kWarps],
                                    T (&slots)[kMaxCluster]) {
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) mine = combine(mine, __shfl_xor_sync(0xFFFFFFFFu, mine, step));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  const uint32_t size = cluster_size();
  if (threadIdx.x < size) {
    T block = warps[0];
    for (int warp = 1; warp < kWarps; ++warp) block = combine(block, warps[warp]);
    *of_block(&slots[cluster_rank()], threadIdx.x) = block;
  }
  cluster_sync();
  T all = neutral;
  for (uint32_t rank = 0; rank < size; ++rank) all = combine(all, slots[rank]);
  return all;
}

}  // namespace foretoken::cuda

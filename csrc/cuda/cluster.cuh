// A cluster of blocks that share one row: its barrier, and what each block tells all others. Without clusters
// (before sm_90) a row has one block, and the same code runs with a cluster of one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace foretoken::cuda {

constexpr int kMaxCluster = 16;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// A barrier of the block for warps whose threads may have come apart, as those of one that leads:
// __syncthreads() asks all threads of a warp for one instruction.
__device__ inline void block_sync() { asm volatile("barrier.sync 0;" ::: "memory"); }

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

// Also a barrier of the block, and orders its shared memory, its neighbours' and global memory: every thread
// waits until what it has written has arrived. A block alone has nobody to wait for.
__device__ inline void cluster_sync() {
  if (cluster_size() == 1) return __syncthreads();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Its two halves, for who has something else to do between them.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The first of them where no memory is to be ordered, so that none is waited for.
__device__ inline void cluster_show_up() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// The same for warps that come to it from different places, their threads perhaps apart: the other form asks
// all threads of a warp for one instruction. Of one block it would become that form, whatever is written.
__device__ inline void cluster_sync_apart() {
  if (cluster_size() == 1) return block_sync();
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
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
__device__ inline void cluster_sync() { block_sync(); }
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_show_up() {}
__device__ inline void cluster_wait() { block_sync(); }
__device__ inline void cluster_sync_apart() { block_sync(); }
template <class T>
__device__ inline T* of_block(T* shared, uint32_t) {
  return shared;
}

#endif

// What this thread wrote, or knew of before, is there for whoever adds to the same place behind it.
__device__ inline uint32_t add_in_order(uint32_t* place, uint32_t amount) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(place), "r"(amount)
               : "memory");
  return before;
}

// A place that others add to in order: what they wrote before is there for whoever reads what they added.
__device__ inline uint32_t read_in_order(const uint32_t* place) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(place) : "memory");
  return value;
}

// body(tile) for those of a row's tiles that are this warp's, when all warps of a cluster share them.
template <class Body>
__device__ inline void for_own_tiles(int64_t tiles, Body body) {
  const int64_t step = static_cast<int64_t>(cluster_size()) * kWarps;
  for (int64_t index = cluster_rank() + static_cast<int64_t>(cluster_size()) * (threadIdx.x / 32);
       index < tiles; index += step) {
    body(index);
  }
}

}  // namespace foretoken::cuda

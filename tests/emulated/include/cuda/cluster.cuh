// Stands for csrc/cuda/cluster.cuh, with the same functions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace foretoken::cuda {

constexpr int kMaxCluster = 16;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

inline void block_sync() { emulated::block_barrier(); }
inline uint32_t cluster_rank() { return emulated::current->block->rank; }
inline uint32_t cluster_size() { return emulated::current->block->size; }
inline void cluster_sync() { emulated::cluster_barrier(); }
inline void cluster_sync_apart() { emulated::cluster_barrier(); }
inline void cluster_arrive() {
  emulated::Cluster& cluster = *emulated::current->block->cluster;
  emulated::current->cluster_times = cluster.meeting.times;
  emulated::arrive(cluster.meeting, cluster.threads);
}
inline void cluster_show_up() { cluster_arrive(); }
inline void cluster_wait() {
  emulated::wait_behind(emulated::current->block->cluster->meeting, emulated::current->cluster_times);
}

template <class T>
T* of_block(T* shared, uint32_t rank) {
  const emulated::Block& block = *emulated::current->block;
  const auto at = reinterpret_cast<uintptr_t>(shared) - reinterpret_cast<uintptr_t>(block.shared);
  return reinterpret_cast<T*>(block.neighbours[rank]->shared + at);
}

inline uint32_t add_in_order(uint32_t* place, uint32_t amount) {
  emulated::pause();
  const uint32_t before = *place;
  *place = before + amount;
  return before;
}

inline uint32_t read_in_order(const uint32_t* place) {
  emulated::pause();
  return *static_cast<const volatile uint32_t*>(place);
}

template <class Body>
void for_own_tiles(int64_t tiles, Body body) {
  const int64_t step = static_cast<int64_t>(cluster_size()) * kWarps;
  for (int64_t index = cluster_rank() + static_cast<int64_t>(cluster_size()) * (threadIdx.x / 32);
       index < tiles; index += step) {
    body(index);
  }
}

}  // namespace foretoken::cuda

// Verification of many plain chains at a time, by warps that take what is to be read from one queue.
#pragma once

#include "cuda/chain_args.hpp"

namespace foretoken::cuda {

constexpr int64_t kLeastQueued = 4;  // below that a cluster for each request is as fast

// Memory of the caller's; `counters` is zero between calls.
struct QueueScratch {
  void* counters = nullptr;
  void* tasks = nullptr;
  uint64_t* masses = nullptr;  // [B, tiles]
  float* sums = nullptr;       // [B, tiles]
};

// Bytes of two of them.
int64_t queue_counter_bytes(int64_t requests);
int64_t queue_task_bytes(int64_t requests);

// Whether the device and the number of requests are such; judged from what the host knows of a call.
bool takes_queue(int64_t requests, Device device);

// Rows without filters.
void verify_queued(const ChainArgs& chain, int64_t requests, DType dtype, const QueueScratch& scratch,
                   Device device, Stream stream);

}  // namespace foretoken::cuda

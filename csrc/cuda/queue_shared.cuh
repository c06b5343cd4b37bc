// What the warps of all blocks keep of requests that they work off together, none of them waiting for another
// as long as there is anything to read.
#pragma once

#include "cuda/chain_rows.cuh"
#include "cuda/global_order.cuh"

namespace foretoken::cuda {

// A request, as all blocks know it.
struct alignas(16) QueueHeader {
  RowReading reading[2];  // of the target, and of the drafts
  ChainHeader header;
};

// Of a warp: the request that it settles.
struct alignas(16) QueueWarp {
  ChainRecord* records;
  const RowReading* reading;
  ChainStep step;
};

// Masses of tiles that are wanted of a request before it can go on: of a residual, or of a row.
struct alignas(16) QueueTask {
  ChainStep step;
  uint32_t request;
  unsigned candidates;  // of the walk
  bool whole;           // there was nothing left to draw from, hence the target's row
};

constexpr int32_t kNoTask = -1;

struct QueueCounters {
  uint32_t next_item;   // that no warp has taken: tiles of a row
  uint32_t next_chunk;  // ... a tile of a task
  uint32_t num_tasks;
  uint32_t num_settled;  // requests
  uint32_t num_left;     // blocks that have nothing more to do
};

// Whatever a walk goes through: a candidate a node, the closing row, and that row once more.
constexpr int64_t kMostTasks = kMostChainDrafts + 4;

// All zero between calls; where it lies goes by the number of requests alone, so that others who use the same
// memory may have other shapes.
struct QueueRequestCounters {
  uint32_t items_read[2 * kMostChainDrafts + 1];  // of each row
  uint32_t laws_made;
  uint32_t task_ready[kMostTasks];   // numbered through all requests
  uint32_t chunks_done[kMostTasks];  // likewise
};

struct QueueArgs {
  ChainArgs chain;
  QueueCounters* counters;
  QueueRequestCounters* requests;  // [B]
  QueueTask* tasks;                // [B * kMostTasks]
  uint64_t* masses;                // [B, tiles] of a request's task
  float* sums;                     // [B, tiles]
  int32_t num_requests;
  int32_t tiles_an_item;
};

struct QueueShared {
  uint32_t first_item;
  uint32_t is_last;
  QueueWarp warps[kWarps];
  __device__ QueueHeader* headers() { return reinterpret_cast<QueueHeader*>(this + 1); }  // [B]
};

__device__ __forceinline__ uint32_t& task_ready(const QueueArgs& args, uint32_t task) {
  return args.requests[task / kMostTasks].task_ready[task % kMostTasks];
}
__device__ __forceinline__ uint32_t& chunks_done(const QueueArgs& args, uint32_t task) {
  return args.requests[task / kMostTasks].chunks_done[task % kMostTasks];
}

}  // namespace foretoken::cuda

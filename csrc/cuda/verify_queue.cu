#include "cuda/verify_queue.hpp"

#include <type_traits>

#include "cuda/chain_launch.hpp"
#include "cuda/chain_queue.cuh"

namespace foretoken::cuda {

namespace {

template <DType kType>
__global__ void __launch_bounds__(kThreads, 1) verify_queue_kernel(const __grid_constant__ QueueArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  ChainQueue<kType>(args, *reinterpret_cast<QueueShared*>(memory)).run();
#endif
}

// More would not fit into a block's memory, and are seldom.
constexpr int64_t kMostRequests = 512;

size_t shared_bytes(int64_t requests) {
  return sizeof(QueueShared) + static_cast<size_t>(requests) * sizeof(QueueHeader);
}

// As many tiles as leave each warp some items, so that the last of them is not waited for long.
int32_t tiles_an_item(int64_t all_tiles, int blocks) {
  constexpr int64_t kItems = 4, kMostTiles = 4;
  const int64_t each = all_tiles / (kItems * kWarps * blocks);
  return static_cast<int32_t>(std::max<int64_t>(1, std::min(each, kMostTiles)));
}

}  // namespace

bool takes_queue(int64_t requests, Device device) {
  return requests >= kLeastQueued && requests <= kMostRequests && limits_of(device).has_clusters;
}

int64_t queue_counter_bytes(int64_t requests) {
  return static_cast<int64_t>(sizeof(QueueCounters)) +
         requests * static_cast<int64_t>(sizeof(QueueRequestCounters));
}

int64_t queue_task_bytes(int64_t requests) {
  return requests * kMostTasks * static_cast<int64_t>(sizeof(QueueTask));
}

void verify_queued(const ChainArgs& chain, int64_t requests, DType dtype, const QueueScratch& scratch,
                   Device device, Stream stream) {
  QueueArgs args;
  args.chain = chain;
  args.counters = static_cast<QueueCounters*>(scratch.counters);
  args.requests = reinterpret_cast<QueueRequestCounters*>(args.counters + 1);
  args.tasks = static_cast<QueueTask*>(scratch.tasks);
  args.masses = scratch.masses;
  args.sums = scratch.sums;
  args.num_requests = static_cast<int32_t>(requests);
  const int64_t rows = chain.most_drafts + 1 + (chain.draft.data != nullptr ? chain.most_drafts : 0);
  const auto launch = [&](auto type) {
    constexpr auto kKernel = verify_queue_kernel<decltype(type)::value>;
    const ClusterRoom& room = room_for<kKernel>(shared_bytes(kMostRequests), device);
    const int64_t tiles = requests * rows * ((chain.vocab + kTile - 1) / kTile);
    const int64_t blocks = std::min<int64_t>(room.clusters[1], (tiles + kWarps - 1) / kWarps);
    args.tiles_an_item = tiles_an_item(tiles, static_cast<int>(blocks));
    launch_clusters(kKernel, blocks, 1, shared_bytes(requests), stream, args);
  };
  switch (dtype) {
    case DType::float32: return launch(std::integral_constant<DType, DType::float32>{});
    case DType::bfloat16: return launch(std::integral_constant<DType, DType::bfloat16>{});
    default: return launch(std::integral_constant<DType, DType::float16>{});
  }
}

}  // namespace foretoken::cuda

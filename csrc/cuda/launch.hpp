// Launching a kernel with one cluster of blocks for each row.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/cluster.cuh"
#include "cuda/errors.hpp"
#include "cuda/overlap.cuh"
#include "ops/tensor_view.hpp"

namespace foretoken::cuda {

struct DeviceLimits {
  int multiprocessors = 0;
  bool has_clusters = false;
};

inline DeviceLimits limits_of(Device device) {
  constexpr int kKept = 16;
  static DeviceLimits kept[kKept];  // written with the same values by whoever comes first
  const int index = device.index;
  if (index < kKept && kept[index].multiprocessors > 0) return kept[index];
  int major = 0;
  DeviceLimits limits;
  throw_if_failed(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index),
                  "device attributes");
  throw_if_failed(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, index),
                  "device attributes");
  limits.has_clusters = major >= 9;
  if (index < kKept) kept[index] = limits;
  return limits;
}

// Large clusters and much shared memory have to be asked for, once for each kernel and device.
inline void allow(const void* kernel, size_t shared) {
  throw_if_failed(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
      "launch");
  throw_if_failed(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "launch");
}

// How many clusters of each size a device holds at a time. The multiprocessors of a device come in groups of
// uneven size, and a cluster has to fit into one: of large ones there are fewer than a division would say.
struct ClusterRoom {
  bool known = false;
  int clusters[kMaxCluster + 1] = {};  // by size
};

// A launch of `clusters` clusters; `attribute` has to outlive its use.
inline cudaLaunchConfig_t configure(int64_t clusters, int cluster, size_t shared,
                                    cudaLaunchAttribute& attribute) {
  attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return config;
}

template <class Args>
void find_room(void (*kernel)(Args), size_t shared, Device device, ClusterRoom& room) {
  const DeviceLimits limits = limits_of(device);
  allow(reinterpret_cast<const void*>(kernel), shared);
  ClusterRoom found;
  int blocks = 0;
  throw_if_failed(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared), "launch");
  found.clusters[1] = blocks * limits.multiprocessors;
  for (int cluster = 2; limits.has_clusters && cluster <= kMaxCluster; ++cluster) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = configure(1, cluster, shared, attribute);
    if (cudaOccupancyMaxActiveClusters(&found.clusters[cluster], kernel, &config) != cudaSuccess) {
      cudaGetLastError();
      found.clusters[cluster] = 0;
    }
  }
  found.known = true;
  room = found;
}

// Of a kernel that is known when this is compiled: every one has its own memory of what was found.
template <auto kKernel>
const ClusterRoom& room_for(size_t shared, Device device) {
  constexpr int kKept = 16;
  static ClusterRoom kept[kKept];  // written with the same values by whoever comes first
  ClusterRoom& room = kept[device.index < kKept ? device.index : kKept - 1];
  if (!room.known) find_room(kKernel, shared, device, room);
  return room;
}

// Blocks of a cluster, and clusters that share the reading of a request's rows.
struct Shape {
  int cluster = 1, clusters = 1;
};

// For `requests` of `tiles` tiles in all rows each: as many blocks as there is room for at a time, in larger
// clusters rather than in more where it makes little difference. Results do not depend on it.
inline Shape shape_for(const ClusterRoom& room, int64_t requests, int64_t tiles, bool shared_reading) {
  Shape best;
  int64_t most = 0;
  for (int cluster = kMaxCluster; cluster >= 1; cluster /= 2) {
    if (room.clusters[cluster] < requests || (cluster > 1 && cluster / 2 * kWarps >= tiles)) continue;
    int64_t clusters = shared_reading ? room.clusters[cluster] / requests : 1;
    clusters = std::max<int64_t>(1, std::min(clusters, tiles / (cluster * kWarps)));
    const int64_t blocks = requests * clusters * cluster;
    if (10 * most >= 9 * blocks) continue;
    most = blocks;
    best = {cluster, static_cast<int>(clusters)};
  }
  return best;
}

// Calls `visit(shape)` for what may serve a request whose rows, of `tiles` tiles each, are read by all
// clusters at once: no more warps than tiles, no more clusters than the device has room for.
template <class Visit>
void for_shapes(const ClusterRoom& room, int64_t requests, int64_t rows, int64_t tiles, bool may_share,
                const Visit& visit) {
  for (int cluster = 1; cluster <= kMaxCluster; ++cluster) {
    const int64_t warps = cluster * kWarps;
    if (cluster > 1 && (room.clusters[cluster] < requests || warps - kWarps >= rows * tiles)) continue;
    const int64_t most =
        may_share ? std::min(room.clusters[cluster] / requests, (rows * tiles + warps - 1) / warps) : 1;
    for (int64_t clusters = 1; clusters <= std::max<int64_t>(most, 1); ++clusters) {
      visit(Shape{cluster, static_cast<int>(clusters)});
    }
  }
}

// As shape_for(), for chains, whose rows are all read at once: `rows` of `tiles` tiles each. All clusters of
// a request read, one of them then takes what is left of kPasses rows, or with kTogether all blocks that are
// no clusters do; the weights are times measured on an H200, in us. A multiprocessor is busy with
// instructions, so they go by tiles of a block.
template <int kPasses, bool kTogether>
Shape find_chain_shape(const ClusterRoom& room, int64_t requests, int64_t rows, int64_t tiles,
                       bool may_share) {
  constexpr double kOfTile = 0.11, kOfTilePair = 0.19, kOfSharing = 1.2, kOfMeeting = 1.2;
  Shape best;
  double least = 1e30;
  const auto visit = [&](const Shape& shape) {
    const bool together = kTogether && shape.cluster == 1 && shape.clusters > 1;
    const double all = static_cast<double>(rows * tiles), blocks = shape.cluster;
    const double of_pass = kOfTilePair * static_cast<double>(tiles) / (together ? shape.clusters : blocks) +
                           (together ? kOfMeeting : 0.0);
    const double cost = kOfTile * all / (blocks * shape.clusters) + kPasses * of_pass +
                        (shape.clusters > 1 ? kOfSharing : 0.0);
    if (cost >= least) return;
    least = cost;
    best = shape;
  };
  for_shapes(room, requests, rows, tiles, may_share, visit);
  if (kTogether && may_share) {  // half of a block's warps are enough, where that brings in other blocks
    const int64_t wanted = ((rows + kPasses) * tiles + kWarps / 2 - 1) / (kWarps / 2);
    const int64_t blocks = std::min(room.clusters[1] / requests, wanted);
    if (blocks > 1) visit({1, static_cast<int>(blocks)});
  }
  return best;
}

// For trees: how many rows of each request are read before anything is decided.
struct TreeShape {
  Shape shape;
  int rows = 1;
};

// Rows beside the path are worth reading where that takes less long than going on row by row: a path is said
// to have three rows behind the root's, each as likely among the first as any.
inline TreeShape find_tree_shape(const ClusterRoom& room, int64_t requests, int64_t rows, int64_t tiles,
                                 bool may_share) {
  constexpr double kOfTile = 1.3, kOfSharing = 1.2, kOfRow = 4.5, kPath = 3.0;
  constexpr int kSteps = 5;
  TreeShape best;
  double least = 1e30;
  for_shapes(room, requests, rows, tiles, may_share, [&](const Shape& shape) {
    const int64_t warps = shape.cluster * kWarps, all = warps * shape.clusters;
    const int64_t last = (rows * tiles + all - 1) / all;
    const double of_row = kOfRow + kOfTile * static_cast<double>((tiles + warps - 1) / warps);
    // The first rows take all warps so many tiles, one after the other.
    for (int64_t i = 0; i <= kSteps; ++i) {
      const int64_t step = i == kSteps ? last : std::min((tiles + all - 1) / all + i, last);
      const int64_t read = std::min(rows, std::max<int64_t>(1, step * all / tiles));
      const double cost = kOfTile * static_cast<double>(step) + (shape.clusters > 1 ? kOfSharing : 0.0) +
                          kPath * of_row * static_cast<double>(rows - read) / static_cast<double>(rows);
      if (cost >= least) continue;
      least = cost;
      best = {shape, static_cast<int>(read)};
    }
  });
  return best;
}

// What one of the searches above finds, unless it was asked for lately: they take microseconds.
template <auto kFind>
auto kept_shape(const ClusterRoom& room, int64_t requests, int64_t rows, int64_t tiles, bool may_share) {
  using Found = decltype(kFind(room, requests, rows, tiles, may_share));
  struct Kept {
    const ClusterRoom* room = nullptr;  // one for each kernel and device, as long as the process lives
    int64_t requests = 0, rows = 0, tiles = 0;
    bool may_share = false;
    Found found;
  };
  constexpr size_t kMostKept = 32;
  thread_local Kept kept[kMostKept];
  Kept& entry = kept[static_cast<size_t>(requests + rows) % kMostKept];
  if (entry.room != &room || entry.requests != requests || entry.rows != rows || entry.tiles != tiles ||
      entry.may_share != may_share) {
    entry = {&room, requests, rows, tiles, may_share, kFind(room, requests, rows, tiles, may_share)};
  }
  return entry.found;
}

// `shared`: bytes of dynamic shared memory a block. room_for() has to have been asked before. `overlaps`: as
// the function says of a kernel that takes its turn.
template <class Args>
void launch_clusters(void (*kernel)(Args), int64_t clusters, int cluster, size_t shared, Stream stream,
                     const Args& args, bool overlaps = false) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = configure(clusters, cluster, shared, attributes[0]);
  if (overlaps) attributes[config.numAttrs++] = overlap_attribute();
  config.stream = static_cast<cudaStream_t>(stream.handle);
  throw_if_failed(cudaLaunchKernelEx(&config, kernel, args), "launch");
}

}  // namespace foretoken::cuda

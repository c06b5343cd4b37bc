// Launching a kernel with one cluster of blocks for each row.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>

#include "cuda/cluster.cuh"
#include "cuda/errors.hpp"
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

constexpr int kClusterSizes[] = {1, 2, 4, 8, 16};

// How many clusters of each size a device holds at a time. The multiprocessors of a device come in groups of
// uneven size, and a cluster has to fit into one: of large ones there are fewer than a division would say.
struct ClusterRoom {
  bool known = false;
  int clusters[std::size(kClusterSizes)] = {};
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
const ClusterRoom& room_for(void (*kernel)(Args), size_t shared, Device device) {
  constexpr int kKept = 16;
  static ClusterRoom kept[kKept];  // of this kernel; written with the same values by whoever comes first
  ClusterRoom& room = kept[device.index < kKept ? device.index : kKept - 1];
  if (room.known) return room;
  const DeviceLimits limits = limits_of(device);
  allow(reinterpret_cast<const void*>(kernel), shared);
  ClusterRoom found;
  found.clusters[0] = limits.multiprocessors;
  for (size_t i = 1; limits.has_clusters && i < std::size(kClusterSizes); ++i) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = configure(1, kClusterSizes[i], shared, attribute);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
      cudaGetLastError();
      clusters = 0;
    }
    found.clusters[i] = std::min(clusters, limits.multiprocessors / kClusterSizes[i]);
  }
  found.known = true;
  room = found;
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
  for (int i = static_cast<int>(std::size(kClusterSizes)) - 1; i >= 0; --i) {
    const int cluster = kClusterSizes[i];
    if (room.clusters[i] < requests || (cluster > 1 && cluster / 2 * kWarps >= tiles)) continue;
    int64_t clusters = shared_reading ? room.clusters[i] / requests : 1;
    clusters = std::max<int64_t>(1, std::min(clusters, tiles / (cluster * kWarps)));
    const int64_t blocks = requests * clusters * cluster;
    if (10 * most >= 9 * blocks) continue;
    most = blocks;
    best = {cluster, static_cast<int>(clusters)};
  }
  return best;
}

// `shared`: bytes of dynamic shared memory a block. room_for() has to have been asked before.
template <class Args>
void launch_clusters(void (*kernel)(Args), int64_t clusters, int cluster, size_t shared, Stream stream,
                     const Args& args) {
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config = configure(clusters, cluster, shared, attribute);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  throw_if_failed(cudaLaunchKernelEx(&config, kernel, args), "launch");
}

}  // namespace foretoken::cuda

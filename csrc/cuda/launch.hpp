// Launching a kernel with one cluster of blocks for each row.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

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

// Blocks that share a row: enough to give every multiprocessor one, no more than there are tiles for their
// warps. Results do not depend on it.
inline int cluster_for(Device device, int64_t rows, int64_t tiles) {
  const DeviceLimits limits = limits_of(device);
  if (!limits.has_clusters) return 1;
  int cluster = 1;
  while (cluster < kMaxCluster && rows * cluster * 2 <= limits.multiprocessors && cluster * kWarps < tiles) {
    cluster *= 2;
  }
  return cluster;
}

// Large clusters and much shared memory have to be asked for, once for each kernel and device.
inline void allow(const void* kernel, size_t shared) {
  throw_if_failed(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
      "launch");
  throw_if_failed(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "launch");
}

// `shared`: bytes of dynamic shared memory a block.
template <class Args>
void launch_clusters(void (*kernel)(Args), int64_t clusters, int cluster, size_t shared, Stream stream,
                     const Args& args) {
  allow(reinterpret_cast<const void*>(kernel), shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  throw_if_failed(cudaLaunchKernelEx(&config, kernel, args), "launch");
}

}  // namespace foretoken::cuda

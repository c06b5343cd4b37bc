#include "cuda/resident.hpp"

#include <algorithm>
#include <type_traits>

#include "cuda/launch.hpp"
#include "cuda/resident_laws.cuh"

namespace foretoken::cuda {

namespace {

template <DType kType>
__global__ void __launch_bounds__(kRowThreads, 1)
    resident_kernel(const __grid_constant__ ChainArgs args, uint32_t rows) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  take_turn();
  extern __shared__ __align__(16) unsigned char memory[];
  ResidentLaws<kType>(args, memory).run(rows);
#endif
}

int64_t most_own(int64_t tiles, int cluster) { return (tiles + cluster - 1) / cluster; }

int64_t tiles_in(int64_t vocab) { return (vocab + kTile - 1) / kTile; }

struct ResidentShape {
  int cluster = 0;
  int64_t clusters = 0;
};

// How many clusters of each size the device holds at a time, where each holds a row.
struct ResidentRoom {
  int clusters[kMaxCluster + 1] = {};
};

template <auto kKernel>
ResidentRoom find_resident_room(int64_t tiles, int64_t element_bytes, Device device) {
  const DeviceLimits limits = limits_of(device);
  const void* const kernel = reinterpret_cast<const void*>(kKernel);
  ResidentRoom room;
  if (!limits.has_clusters || !waits_by_itself(kernel, device)) return room;  // it has no code there
  int most_shared = 0;
  throw_if_failed(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index),
                  "device attributes");
  allow(kernel, static_cast<size_t>(most_shared));
  for (int cluster = 1; cluster <= kMaxCluster; ++cluster) {
    const int64_t shared = resident_bytes(tiles, most_own(tiles, cluster), element_bytes);
    if (shared > most_shared) continue;
    if (cluster == 1) {
      int blocks = 0;
      throw_if_failed(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, kRowThreads,
                                                                    static_cast<size_t>(shared)),
                      "launch");
      room.clusters[1] = blocks * limits.multiprocessors;
      continue;
    }
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = configure(1, cluster, static_cast<size_t>(shared), attribute);
    config.blockDim = dim3(kRowThreads);
    if (cudaOccupancyMaxActiveClusters(&room.clusters[cluster], kKernel, &config) != cudaSuccess) {
      cudaGetLastError();
      room.clusters[cluster] = 0;
    }
  }
  return room;
}

// Rows are taken in waves. A row takes so long by itself, more the more blocks have to wait for each other,
// and a multiprocessor that has several blocks so long for its tiles; in us on an H200, measured.
ResidentShape find_shape(const ResidentRoom& room, int64_t rows, int64_t tiles, int multiprocessors) {
  constexpr double kOfRow = 14.0, kOfBlock = 0.6, kOfOwnTile = 0.3;
  int best = 0;
  double least = 1e30;
  for (int cluster = 1; cluster <= kMaxCluster; ++cluster) {
    if (room.clusters[cluster] == 0) continue;
    const int64_t at_once = std::min<int64_t>(rows, room.clusters[cluster]);
    const int64_t waves = (rows + room.clusters[cluster] - 1) / room.clusters[cluster];
    const int64_t beside = (at_once * cluster + multiprocessors - 1) / multiprocessors;
    const double own = kOfOwnTile * static_cast<double>(most_own(tiles, cluster));
    const double cost = static_cast<double>(waves) *
                        std::max(kOfRow + kOfBlock * cluster + own, own * static_cast<double>(beside));
    if (cost >= least) continue;
    least = cost;
    best = cluster;
  }
  return {best, std::min<int64_t>(rows, room.clusters[best])};
}

// By shape, as the same ones come again and again; clusters of 0: none of any size holds a row.
template <auto kKernel>
ResidentShape shape_for(int64_t rows, int64_t tiles, int64_t element_bytes, Device device) {
  struct Kept {
    int64_t rows = 0, tiles = 0;
    int device = -1;
    ResidentShape shape;
  };
  constexpr size_t kMostKept = 16;
  thread_local Kept kept[kMostKept];
  Kept& entry = kept[static_cast<size_t>(rows + tiles) % kMostKept];
  if (entry.rows != rows || entry.tiles != tiles || entry.device != device.index) {
    const ResidentRoom room = find_resident_room<kKernel>(tiles, element_bytes, device);
    entry = {rows, tiles, device.index, find_shape(room, rows, tiles, limits_of(device).multiprocessors)};
  }
  return entry.shape;
}

}  // namespace

bool launch_resident(DType dtype, const ChainArgs& args, int64_t requests, Device device, Stream stream) {
  const int64_t rows = requests * rows_of_request(args), tiles = tiles_in(args.vocab),
                bytes = bytes_of(dtype);
  const auto launch = [&](auto type) {
    constexpr auto kKernel = resident_kernel<decltype(type)::value>;
    const ResidentShape shape = shape_for<kKernel>(rows, tiles, bytes, device);
    if (shape.cluster == 0) return false;
    const int64_t shared = resident_bytes(tiles, most_own(tiles, shape.cluster), bytes);
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config =
        configure(shape.clusters, shape.cluster, static_cast<size_t>(shared), attributes[0]);
    config.blockDim = dim3(kRowThreads);
    if (overlaps<kKernel>(device)) attributes[config.numAttrs++] = overlap_attribute();
    config.stream = static_cast<cudaStream_t>(stream.handle);
    throw_if_failed(cudaLaunchKernelEx(&config, kKernel, args, static_cast<uint32_t>(rows)), "launch");
    return true;
  };
  switch (dtype) {
    case DType::float32: return launch(std::integral_constant<DType, DType::float32>{});
    case DType::bfloat16: return launch(std::integral_constant<DType, DType::bfloat16>{});
    default: return launch(std::integral_constant<DType, DType::float16>{});
  }
}

}  // namespace foretoken::cuda

// As much of CUDA as the kernels that are emulated name; see device.hpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "device.hpp"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __shared__
#define __align__(bytes) alignas(bytes)
#define __grid_constant__
#define __launch_bounds__(...)

#define threadIdx (::emulated::current->thread)
#define blockIdx (::emulated::current->block->index)
inline const emulated::Index &gridDim = emulated::grid, &blockDim = emulated::threads_of_block;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

using std::max;
using std::min;

inline float __uint_as_float(uint32_t bits) { return emulated::from_word<float>(bits); }
inline float __int_as_float(int32_t bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int32_t __vimax3_s32(int32_t a, int32_t b, int32_t c) { return std::max(a, std::max(b, c)); }
inline uint32_t __vimax3_u32(uint32_t a, uint32_t b, uint32_t c) { return std::max(a, std::max(b, c)); }
inline uint32_t __vimin3_u32(uint32_t a, uint32_t b, uint32_t c) { return std::min(a, std::min(b, c)); }

template <class T>
T __ldg(const T* place) {
  return *place;
}
template <class T>
T __ldcg(const T* place) {
  return *place;
}
template <class T>
T __ldcs(const T* place) {
  return *place;
}
template <class T, class U>
void __stcg(T* place, U value) {
  *place = static_cast<T>(value);
}

inline void __syncthreads() { emulated::block_barrier(); }
inline int __syncthreads_and(bool value) {
  emulated::Block& block = *emulated::current->block;
  const uint64_t times = block.meeting.times;
  if (!value) block.against[times % 4] = true;
  block.against[(times + 2) % 4] = false;  // nobody votes there yet, and nobody reads there any more
  emulated::block_barrier();
  return !block.against[times % 4];
}
inline void __nanosleep(unsigned) { emulated::pause(); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { emulated::exchange(mask, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulated::from_word<T>(emulated::exchange(mask, value)[lane & 31]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  return emulated::from_word<T>(emulated::exchange(mask, value)[(emulated::current->lane ^ step) & 31]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned step) {
  const int lane = emulated::current->lane, from = lane - static_cast<int>(step);
  return emulated::from_word<T>(emulated::exchange(mask, value)[from < 0 ? lane : from]);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned step) {
  const int lane = emulated::current->lane, from = lane + static_cast<int>(step);
  return emulated::from_word<T>(emulated::exchange(mask, value)[from > 31 ? lane : from]);
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
  const uint64_t* const words = emulated::exchange(mask, value);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (words[lane] != 0 ? 1u : 0u) << lane;
  return bits;
}
inline int __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline int __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) == 0xFFFFFFFFu; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t* const words = emulated::exchange(mask, value);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane)
    bits |= (words[lane] == words[emulated::current->lane] ? 1u : 0u) << lane;
  return bits;
}
template <class T, class Fold>
T fold_of_warp(unsigned mask, T value, Fold fold) {
  const uint64_t* const words = emulated::exchange(mask, value);
  T all = emulated::from_word<T>(words[0]);
  for (int lane = 1; lane < 32; ++lane) all = fold(all, emulated::from_word<T>(words[lane]));
  return all;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return fold_of_warp(mask, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return fold_of_warp(mask, value, [](T a, T b) { return std::max(a, b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return fold_of_warp(mask, value, [](T a, T b) { return std::min(a, b); });
}

template <class T, class U>
T atomicAdd(T* place, U value) {
  const T before = *place;
  *place = static_cast<T>(before + value);
  return before;
}
template <class T, class U>
T atomicMin(T* place, U value) {
  const T before = *place;
  *place = std::min(before, static_cast<T>(value));
  return before;
}
template <class T>
T atomicCAS(T* place, T expected, T desired) {
  emulated::pause();
  const T before = *place;
  if (before == expected) *place = desired;
  return before;
}
inline long long clock64() { return emulated::clock(); }

// ---------------------------------------------------------------------------------------- launches

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };
// The devices, by index. Those before 9.0 have no clusters.
struct EmulatedDevice {
  int multiprocessors, major;
};
constexpr EmulatedDevice kDevices[] = {{2, 9}, {5, 8}, {8, 9}, {12, 8}, {12, 9}, {24, 8}};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int index) {
  *value =
      which == cudaDevAttrComputeCapabilityMajor ? kDevices[index].major : kDevices[index].multiprocessors;
  return cudaSuccess;
}
inline int multiprocessors = 0;  // of the device that is asked next

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
inline unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return config.attrs[i].val.clusterDim.x;
  }
  return 1;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t* config) {
  *clusters = multiprocessors / static_cast<int>(cluster_of(*config));
  return cudaSuccess;
}
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Args&... args) {
  emulated::Launch launch{config->gridDim.x, config->blockDim.x, cluster_of(*config),
                          config->dynamicSmemBytes};
  emulated::run(launch, [&] { kernel(args...); });
  return cudaSuccess;
}

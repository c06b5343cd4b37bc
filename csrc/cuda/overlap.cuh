// Programmatic dependent launch: a kernel is brought up while the one before it in its stream, or its graph,
// still runs, and waits for it there.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

#include "cuda/errors.hpp"
#include "ops/tensor_view.hpp"

namespace foretoken::cuda {

// The first statement of a kernel that is launched so: nothing may be read or written before. What follows
// it may come up, and waits for this kernel's end in turn, so that the order of all kernels is what it was.
__device__ __forceinline__ void take_turn() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Of a kernel that takes its turn. One that was compiled for older devices, and only translated for this one,
// does not wait.
inline bool waits_by_itself(const void* kernel, Device device) {
  int major = 0;
  throw_if_failed(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index),
                  "device attributes");
  cudaFuncAttributes attributes{};
  throw_if_failed(cudaFuncGetAttributes(&attributes, kernel), "launch");
  return major >= 9 && attributes.ptxVersion >= 90;
}

// Unless the environment says no, so that a fault can be told from what it causes.
inline bool may_overlap() {
  const char* const wanted = std::getenv("FORETOKEN_OVERLAP");
  return wanted == nullptr || std::strcmp(wanted, "0") != 0;
}

// Whether launches of a kernel that takes its turn need not wait for the one before.
template <auto kKernel>
bool overlaps(Device device) {
  constexpr int kKept = 16;
  static signed char kept[kKept];  // 1: yes, -1: no; written with the same values by whoever comes first
  signed char& answer = kept[device.index < kKept ? device.index : kKept - 1];
  if (answer == 0) {
    const bool found = may_overlap() && waits_by_itself(reinterpret_cast<const void*>(kKernel), device);
    answer = found ? 1 : -1;
  }
  return answer > 0;
}

inline cudaLaunchAttribute overlap_attribute() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// Launches a kernel that takes its turn.
template <auto kKernel, class... Args>
void launch_in_turn(dim3 blocks, dim3 threads, Device device, Stream stream, const Args&... args) {
  cudaLaunchAttribute attribute = overlap_attribute();
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &attribute;
  config.numAttrs = overlaps<kKernel>(device) ? 1 : 0;
  throw_if_failed(cudaLaunchKernelEx(&config, kKernel, args...), "launch");
}

}  // namespace foretoken::cuda

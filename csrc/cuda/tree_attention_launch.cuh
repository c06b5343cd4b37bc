// Launching the kernels of tree attention.
#pragma once

#include <algorithm>

#include "cuda/errors.hpp"
#include "cuda/tree_attention_kernel.cuh"
#include "ops/tree_attention.hpp"

namespace foretoken::cuda::attend {

constexpr int kMostBlocks = static_cast<int>(kAttentionCounterBytes / 8);  // two counters for each
constexpr int kMostRows = 1024;                                            // of a launch

// How a launch is cut, from shapes alone.
struct LaunchPlan {
  int head_size = 0;  // of the kernel: 128 or 256
  int teams = 0, row_blocks = 0, groups = 0, ring = 0, partial_slots = 0;
  int64_t shared_bytes = 0, partial_bytes = 0, total_bytes = 0;

  int blocks() const { return groups * row_blocks; }
  int64_t workspace() const { return kAttentionCounterBytes + partial_bytes + total_bytes; }
};

// Of `limit` bytes of shared memory, with as many buffers as fit.
template <int kD, int kTeams, bool kFloat8>
void plan_shared(LaunchPlan& plan, int64_t limit, int batch, bool hopper) {
  using Plan = SharedPlan<kD, kTeams, kFloat8>;
  const int64_t left = limit - Plan::bytes(0, batch, plan.groups, hopper);
  plan.ring = static_cast<int>(std::min<int64_t>(left / Plan::kBufferBytes, Plan::kMostBuffers));
  if (plan.ring < 2) throw std::runtime_error("tree_attention: this device has too little shared memory");
  plan.shared_bytes = Plan::bytes(plan.ring, batch, plan.groups, hopper);
  const int64_t slot_bytes = PartialSlot<kD, kTeams>::kFloats * static_cast<int64_t>(sizeof(float));
  plan.partial_bytes = plan.blocks() * plan.partial_slots * slot_bytes;
  const bool shared = Plan::total_bytes(hopper) > 0;
  plan.total_bytes = shared ? 0 : plan.blocks() * int64_t{kTeams} * Plan::kTotalBytes;
}

template <class Element, int kD, int kTeams, bool kFloat8>
void launch(const LaunchPlan& plan, const Task& task, const Maps& maps, int device, cudaStream_t stream) {
  constexpr int kKept = 16;
  static bool allowed[kKept];  // written with the same value by whoever comes first
  void (*const kernel)(Task, Maps) = tree_attention_kernel<Element, kD, kTeams, kFloat8>;
  if (device >= kKept || !allowed[device]) {
    int limit = 0;
    throw_if_failed(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                    "launch");
    throw_if_failed(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, limit),
                    "launch");
    if (device < kKept) allowed[device] = true;
  }
  cudaLaunchAttribute together{};  // blocks that share a pair wait for each other
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks()));
  config.blockDim = dim3((kTeams + 1) * kTeam);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = plan.groups > 1 ? 1 : 0;
  throw_if_failed(cudaLaunchKernelEx(&config, kernel, task, maps), "launch");
}

// For a file of each kind of product: its instances.
template <class Element, bool kFloat8>
void launch_kind(const LaunchPlan& plan, const Task& task, const Maps& maps, int device,
                 cudaStream_t stream) {
  if (plan.head_size == 256) return launch<Element, 256, 1, kFloat8>(plan, task, maps, device, stream);
  if (plan.teams == 1) return launch<Element, 128, 1, kFloat8>(plan, task, maps, device, stream);
  return launch<Element, 128, 2, kFloat8>(plan, task, maps, device, stream);
}

// Whether the code that this device runs was made with kIsHopper.
bool runs_hopper_code();

void launch_bfloat16(const LaunchPlan& plan, const Task& task, const Maps& maps, int device,
                     cudaStream_t stream);
void launch_float16(const LaunchPlan& plan, const Task& task, const Maps& maps, int device,
                    cudaStream_t stream);
void launch_float8(const LaunchPlan& plan, const Task& task, const Maps& maps, int device,
                   cudaStream_t stream);

}  // namespace foretoken::cuda::attend

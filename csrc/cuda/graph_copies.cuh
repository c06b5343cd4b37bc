// Copies and fills of a captured round as kernels: behind a conditional node a copy engine's work costs
// microseconds that a kernel does not.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "cuda/errors.hpp"

namespace foretoken::cuda {

constexpr int kMoveThreads = 256;
constexpr size_t kMostMoveBlocks = 1056;

template <class Piece>
__global__ void __launch_bounds__(kMoveThreads) move_kernel(Piece* to, const Piece* from, size_t count) {
  const size_t step = size_t{gridDim.x} * kMoveThreads;
  for (size_t i = size_t{blockIdx.x} * kMoveThreads + threadIdx.x; i < count; i += step) to[i] = from[i];
}

template <class Piece>
__global__ void __launch_bounds__(kMoveThreads) fill_kernel(Piece* to, Piece value, size_t count) {
  const size_t step = size_t{gridDim.x} * kMoveThreads;
  for (size_t i = size_t{blockIdx.x} * kMoveThreads + threadIdx.x; i < count; i += step) to[i] = value;
}

// Puts kernels in the place of nodes of a graph.
class CopiesAsKernels {
 public:
  explicit CopiesAsKernels(cudaGraph_t graph) : graph_(graph) {}

  static bool has_next(cudaGraphNode_t node) {
    size_t count = 0;
    const cudaError_t state = ask(node, false, nullptr, count);
    if (state == cudaErrorLossyQuery) {  // of edges with data, which are edges
      cudaGetLastError();
      return true;
    }
    throw_if_failed(state, kWhat);
    return count > 0;
  }

  // How many were replaced: copies inside a device and fills, of one line each.
  int64_t run() {
    size_t count = 0;
    throw_if_failed(cudaGraphGetNodes(graph_, nullptr, &count), kWhat);
    std::vector<cudaGraphNode_t> nodes(count);
    if (count > 0) throw_if_failed(cudaGraphGetNodes(graph_, nodes.data(), &count), kWhat);
    int64_t replaced = 0;
    for (const cudaGraphNode_t node : nodes) {
      cudaGraphNodeType type{};
      throw_if_failed(cudaGraphNodeGetType(node, &type), kWhat);
      if (type == cudaGraphNodeTypeMemcpy) replaced += replace_copy(node);
      if (type == cudaGraphNodeTypeMemset) replaced += replace_fill(node);
    }
    return replaced;
  }

 private:
  static constexpr const char* kWhat = "copies of the round";

  static bool on_device(const void* pointer) {
    cudaPointerAttributes attributes{};
    throw_if_failed(cudaPointerGetAttributes(&attributes, pointer), kWhat);
    return attributes.type == cudaMemoryTypeDevice;
  }

  bool replace_copy(cudaGraphNode_t node) {
    cudaMemcpy3DParms params{};
    throw_if_failed(cudaGraphMemcpyNodeGetParams(node, &params), kWhat);
    const bool line = params.srcArray == nullptr && params.dstArray == nullptr && params.extent.height == 1 &&
                      params.extent.depth == 1 && params.srcPos.y == 0 && params.srcPos.z == 0 &&
                      params.dstPos.y == 0 && params.dstPos.z == 0;
    if (!line || params.extent.width == 0) return false;
    char* to = static_cast<char*>(params.dstPtr.ptr) + params.dstPos.x;
    const char* from = static_cast<const char*>(params.srcPtr.ptr) + params.srcPos.x;
    if (!on_device(to) || !on_device(from)) return false;
    size_t bytes = params.extent.width;
    const uintptr_t all = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes;
    const size_t piece = all % sizeof(uint4) == 0 ? sizeof(uint4) : all % sizeof(uint32_t) == 0 ? 4 : 1;
    size_t pieces = bytes / piece;
    void* arguments[] = {&to, &from, &pieces};
    const void* const kernel = piece == sizeof(uint4) ? reinterpret_cast<const void*>(move_kernel<uint4>)
                               : piece == 4           ? reinterpret_cast<const void*>(move_kernel<uint32_t>)
                                                      : reinterpret_cast<const void*>(move_kernel<uint8_t>);
    put(kernel, arguments, pieces, node);
    return true;
  }

  bool replace_fill(cudaGraphNode_t node) {
    cudaMemsetParams params{};
    throw_if_failed(cudaGraphMemsetNodeGetParams(node, &params), kWhat);
    if (params.height > 1 || params.width == 0 || !on_device(params.dst)) return false;
    void* to = params.dst;
    size_t count = params.width;
    auto one = static_cast<uint8_t>(params.value);
    auto two = static_cast<uint16_t>(params.value);
    auto four = static_cast<uint32_t>(params.value);
    const unsigned size = params.elementSize;
    void* const value = size == 1   ? static_cast<void*>(&one)
                        : size == 2 ? static_cast<void*>(&two)
                                    : static_cast<void*>(&four);
    void* arguments[] = {&to, value, &count};
    const void* const kernel = size == 1   ? reinterpret_cast<const void*>(fill_kernel<uint8_t>)
                               : size == 2 ? reinterpret_cast<const void*>(fill_kernel<uint16_t>)
                                           : reinterpret_cast<const void*>(fill_kernel<uint32_t>);
    put(kernel, arguments, count, node);
    return true;
  }

  void put(const void* kernel, void** arguments, size_t pieces, cudaGraphNode_t old) {
    const std::vector<cudaGraphNode_t> before = neighbours(old, true), after = neighbours(old, false);
    const size_t blocks = (pieces + kMoveThreads - 1) / kMoveThreads;
    cudaKernelNodeParams params{};
    params.func = const_cast<void*>(kernel);
    params.gridDim = dim3(static_cast<unsigned>(blocks < kMostMoveBlocks ? blocks : kMostMoveBlocks));
    params.blockDim = dim3(kMoveThreads);
    params.kernelParams = arguments;
    cudaGraphNode_t node = nullptr;
    throw_if_failed(cudaGraphAddKernelNode(&node, graph_, before.data(), before.size(), &params), kWhat);
    for (const cudaGraphNode_t next : after) {
#if CUDART_VERSION >= 13000
      throw_if_failed(cudaGraphAddDependencies(graph_, &node, &next, nullptr, 1), kWhat);
#else
      throw_if_failed(cudaGraphAddDependencies(graph_, &node, &next, 1), kWhat);
#endif
    }
    throw_if_failed(cudaGraphDestroyNode(old), kWhat);
  }

  // Those in front of a node, or behind it.
  static std::vector<cudaGraphNode_t> neighbours(cudaGraphNode_t node, bool in_front) {
    size_t count = 0;
    throw_if_failed(ask(node, in_front, nullptr, count), kWhat);
    std::vector<cudaGraphNode_t> found(count);
    if (count > 0) throw_if_failed(ask(node, in_front, found.data(), count), kWhat);
    return found;
  }

  static cudaError_t ask(cudaGraphNode_t node, bool in_front, cudaGraphNode_t* found, size_t& count) {
#if CUDART_VERSION >= 13000
    return in_front ? cudaGraphNodeGetDependencies(node, found, nullptr, &count)
                    : cudaGraphNodeGetDependentNodes(node, found, nullptr, &count);
#else
    return in_front ? cudaGraphNodeGetDependencies(node, found, &count)
                    : cudaGraphNodeGetDependentNodes(node, found, &count);
#endif
  }

  cudaGraph_t graph_;
};

}  // namespace foretoken::cuda

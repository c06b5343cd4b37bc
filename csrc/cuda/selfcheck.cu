#include <cuda_runtime.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "ops/selfcheck.hpp"

namespace foretoken::cuda {

namespace {

constexpr int kThreads = 128;

__global__ void self_check_kernel(const SelfCheckInput* inputs, SelfCheckOutput* outputs, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index < count) outputs[index] = foretoken::self_check(inputs[index]);
}

void throw_if_failed(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

struct DeviceFree {
  void operator()(void* pointer) const { cudaFree(pointer); }
};

template <typename T>
std::unique_ptr<T, DeviceFree> device_array(int64_t count) {
  void* pointer = nullptr;
  throw_if_failed(cudaMalloc(&pointer, static_cast<size_t>(count) * sizeof(T)), "self check: allocate");
  return std::unique_ptr<T, DeviceFree>(static_cast<T*>(pointer));
}

}  // namespace

void self_check(const SelfCheckInput* inputs, SelfCheckOutput* outputs, int64_t count) {
  if (count <= 0) return;
  const auto device_inputs = device_array<SelfCheckInput>(count);
  const auto device_outputs = device_array<SelfCheckOutput>(count);
  const size_t input_bytes = static_cast<size_t>(count) * sizeof(SelfCheckInput);
  const size_t output_bytes = static_cast<size_t>(count) * sizeof(SelfCheckOutput);
  throw_if_failed(cudaMemcpy(device_inputs.get(), inputs, input_bytes, cudaMemcpyHostToDevice),
                  "self check: copy in");
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  self_check_kernel<<<blocks, kThreads>>>(device_inputs.get(), device_outputs.get(), count);
  throw_if_failed(cudaGetLastError(), "self check: launch");
  throw_if_failed(cudaMemcpy(outputs, device_outputs.get(), output_bytes, cudaMemcpyDeviceToHost),
                  "self check: copy out");
}

}  // namespace foretoken::cuda

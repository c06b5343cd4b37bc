#include "cuda/sampling_mirror.hpp"

#include <cstring>
#include <vector>

#include "cuda/errors.hpp"

namespace foretoken::cuda {

namespace {

// Seeds first: they have the widest elements, so that everything is aligned.
template <class Visit>
void visit_arrays(const SamplingView& host, char* memory, SamplingView& device, Visit visit) {
  const auto next = [&](const auto* from, auto& to) {
    to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(memory);
    const size_t bytes = static_cast<size_t>(host.size) * sizeof(*from);
    visit(memory, from, bytes);
    memory += bytes;
  };
  next(host.seed, device.seed);
  next(host.temperature, device.temperature);
  next(host.top_k, device.top_k);
  next(host.top_p, device.top_p);
  next(host.min_p, device.min_p);
  device.size = host.size;
}

size_t bytes_of(const SamplingView& host) { return static_cast<size_t>(host.size) * 24; }

}  // namespace

SamplingMirror::SamplingMirror(const SamplingView& host, Device device, Stream stream) : device_(device) {
  int before = 0;
  throw_if_failed(cudaGetDevice(&before), "sampling");
  throw_if_failed(cudaSetDevice(device.index), "sampling");
  const cudaError_t status = cudaMalloc(&memory_, bytes_of(host) > 0 ? bytes_of(host) : 1);
  throw_if_failed(cudaSetDevice(before), "sampling");
  throw_if_failed(status, "sampling: prepare the table before capturing a graph");
  update(host, stream);
}

SamplingMirror::~SamplingMirror() { cudaFree(memory_); }

void SamplingMirror::update(const SamplingView& host, Stream stream) {
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  throw_if_failed(cudaStreamIsCapturing(handle, &capturing), "sampling");
  if (capturing != cudaStreamCaptureStatusNone) {
    throw std::runtime_error(
        "sampling: the table has changed since it was last used, and a graph is being captured; "
        "use it once before");
  }
  std::vector<char> packed(bytes_of(host));
  visit_arrays(host, packed.data(), view_,
               [](char* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); });
  // From pageable memory the call returns once the numbers have been staged: `packed` may go.
  throw_if_failed(cudaMemcpyAsync(memory_, packed.data(), packed.size(), cudaMemcpyHostToDevice, handle),
                  "sampling");
  visit_arrays(host, static_cast<char*>(memory_), view_, [](char*, const void*, size_t) {});
}

}  // namespace foretoken::cuda

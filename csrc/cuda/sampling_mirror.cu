#include "cuda/sampling_mirror.hpp"

#include <cstring>
#include <type_traits>
#include <utility>

#include "cuda/errors.hpp"

namespace foretoken::cuda {

namespace {

// Bytes that will lie at `device`, put together on the host.
class Packed {
 public:
  explicit Packed(void* device) : device_(reinterpret_cast<uintptr_t>(device)) {}

  template <class Element>
  const Element* add(const Element* from, int64_t count) {
    static_assert(std::is_trivially_copyable_v<Element>);
    bytes_.resize((bytes_.size() + alignof(Element) - 1) / alignof(Element) * alignof(Element));
    const size_t at = bytes_.size(), size = static_cast<size_t>(count) * sizeof(Element);
    bytes_.resize(at + size);
    if (size > 0) std::memcpy(bytes_.data() + at, from, size);
    return reinterpret_cast<const Element*>(device_ + at);
  }

  const std::vector<char>& bytes() const { return bytes_; }

 private:
  uintptr_t device_;
  std::vector<char> bytes_;
};

SamplingView pack_numbers(const SamplingView& host, const std::vector<Constraints>& constraints,
                          Packed& packed) {
  SamplingView device;
  device.size = host.size;
  device.weighs_rows = host.weighs_rows;
  device.filters_rows = host.filters_rows;
  device.seed = packed.add(host.seed, host.size);
  device.temperature = packed.add(host.temperature, host.size);
  device.top_k = packed.add(host.top_k, host.size);
  device.top_p = packed.add(host.top_p, host.size);
  device.min_p = packed.add(host.min_p, host.size);
  const Constraints* place = packed.add(constraints.data(), host.size);
  if (host.constraints != nullptr) device.constraints = place;
  return device;
}

Constraints pack_lists(const Constraints& host, Packed& packed) {
  Constraints device = host;
  device.bias_ids = packed.add(host.bias_ids, host.num_bias);
  device.bias = packed.add(host.bias, host.num_bias);
  device.held_ids = packed.add(host.held_ids, host.num_held);
  device.bad_word_ends = packed.add(host.bad_word_ends, host.num_bad_words);
  device.bad_words = packed.add(
      host.bad_words, host.num_bad_words > 0 ? int64_t{host.bad_word_ends[host.num_bad_words - 1]} : 0);
  return device;
}

size_t bytes_of_lists(const SamplingView& host) {
  Packed packed(nullptr);
  for (int64_t slot = 0; host.constraints != nullptr && slot < host.size; ++slot) {
    pack_lists(host.constraints[slot], packed);
  }
  return packed.bytes().size();
}

// From pageable memory the call returns once the bytes have been staged: they may go.
void copy(void* to, const std::vector<char>& from, cudaStream_t stream) {
  if (from.empty()) return;
  throw_if_failed(cudaMemcpyAsync(to, from.data(), from.size(), cudaMemcpyHostToDevice, stream), "sampling");
}

}  // namespace

SamplingMirror::SamplingMirror(const SamplingView& host, Device device, Stream stream) : device_(device) {
  Packed numbers(nullptr);
  pack_numbers(host, std::vector<Constraints>(static_cast<size_t>(host.size)), numbers);
  allocate(numbers.bytes().size());
  try {
    update(host, stream);
    // The first call may be followed by one on another stream, which knows nothing of this one's copies.
    throw_if_failed(cudaStreamSynchronize(static_cast<cudaStream_t>(stream.handle)), "sampling");
  } catch (...) {
    for (void* block : blocks_) cudaFree(block);
    throw;
  }
}

SamplingMirror::~SamplingMirror() {
  for (void* block : blocks_) cudaFree(block);
}

void* SamplingMirror::allocate(size_t bytes) {
  int before = 0;
  void* block = nullptr;
  throw_if_failed(cudaGetDevice(&before), "sampling");
  throw_if_failed(cudaSetDevice(device_.index), "sampling");
  const cudaError_t status = cudaMalloc(&block, bytes > 0 ? bytes : 1);
  throw_if_failed(cudaSetDevice(before), "sampling");
  throw_if_failed(status, "sampling: prepare the table before capturing a graph");
  blocks_.push_back(block);
  return block;
}

void SamplingMirror::update(const SamplingView& host, Stream stream) {
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  throw_if_failed(cudaStreamIsCapturing(handle, &capturing), "sampling");
  if (capturing != cudaStreamCaptureStatusNone) {
    throw std::runtime_error(
        "sampling: the table has changed since it was last used, and a graph is being captured; "
        "use it once before");
  }
  const size_t needed = bytes_of_lists(host);
  if (needed > lists_room_) {
    allocate(2 * needed);  // twice: lists that grow one by one do not leave a block each
    lists_room_ = 2 * needed;
  }
  Packed lists(blocks_.back());
  std::vector<Constraints> constraints(static_cast<size_t>(host.size));
  for (int64_t slot = 0; host.constraints != nullptr && slot < host.size; ++slot) {
    constraints[static_cast<size_t>(slot)] = pack_lists(host.constraints[slot], lists);
  }
  copy(blocks_.back(), lists.bytes(), handle);
  Packed numbers(blocks_.front());
  view_ = pack_numbers(host, constraints, numbers);
  copy(blocks_.front(), numbers.bytes(), handle);
}

}  // namespace foretoken::cuda

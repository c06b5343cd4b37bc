// The copy of a sampling table that kernels read.
#pragma once

#include <vector>

#include "ops/sampling.hpp"

namespace foretoken::cuda {

class SamplingMirror {
 public:
  // Takes a copy on its own stream and waits for it: never inside a captured graph (throws there).
  SamplingMirror(const SamplingView& host, Device device, Stream stream);
  ~SamplingMirror();
  SamplingMirror(const SamplingMirror&) = delete;
  SamplingMirror& operator=(const SamplingMirror&) = delete;

  // The host's numbers have changed; the count of slots has not. Ordered behind what the stream holds. The
  // numbers stay where they are, for graphs that have been captured; lists that have outgrown their place
  // move, and their old place is kept. view().constraints is null while no slot has any: a graph captured
  // then knows of none.
  void update(const SamplingView& host, Stream stream);

  const SamplingView& view() const { return view_; }
  Device device() const { return device_; }

 private:
  void* allocate(size_t bytes);

  Device device_;
  std::vector<void*> blocks_;  // the first has the numbers, the last the lists
  size_t lists_room_ = 0;
  SamplingView view_;
};

}  // namespace foretoken::cuda

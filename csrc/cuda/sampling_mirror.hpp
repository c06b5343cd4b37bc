// The copy of a sampling table that kernels read.
#pragma once

#include <memory>

#include "ops/sampling.hpp"

namespace foretoken::cuda {

class SamplingMirror {
 public:
  // Takes a copy on its own stream and waits for it: never inside a captured graph (throws there).
  SamplingMirror(const SamplingView& host, Device device, Stream stream);
  ~SamplingMirror();
  SamplingMirror(const SamplingMirror&) = delete;
  SamplingMirror& operator=(const SamplingMirror&) = delete;

  // The host's numbers have changed; their count has not. Ordered behind what the stream holds.
  void update(const SamplingView& host, Stream stream);

  const SamplingView& view() const { return view_; }
  Device device() const { return device_; }

 private:
  Device device_;
  void* memory_ = nullptr;
  SamplingView view_;
};

}  // namespace foretoken::cuda

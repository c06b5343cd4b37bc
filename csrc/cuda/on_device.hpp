// The current device for as long as something is launched on it, whatever the caller's current one is.
#pragma once

#include "cuda/errors.hpp"
#include "ops/tensor_view.hpp"

namespace foretoken::cuda {

class OnDevice {
 public:
  explicit OnDevice(Device device) : wanted_(device.index) {
    throw_if_failed(cudaGetDevice(&before_), "current device");
    if (before_ != wanted_) throw_if_failed(cudaSetDevice(wanted_), "current device");
  }
  ~OnDevice() {
    if (before_ != wanted_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0, wanted_;
};

}  // namespace foretoken::cuda

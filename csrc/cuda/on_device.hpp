// The current device for as long as something is launched on it, whatever the caller's current one is. Needs
// no header of CUDA's: the dispatch holds one.
#pragma once

#include "ops/tensor_view.hpp"

namespace foretoken::cuda {

class OnDevice {
 public:
  explicit OnDevice(Device device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0, wanted_;
};

// Also where the stream cannot tell, for the capture of another.
bool is_capturing(Device device, Stream stream);

}  // namespace foretoken::cuda

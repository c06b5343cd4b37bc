// What can be found out about the CUDA devices of this machine, without failing when there is none.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace foretoken {

enum class CudaStatus : uint8_t {
  ready,
  not_built,   // the binary has no CUDA code
  no_driver,   // no libcuda.so.1 on this machine
  old_driver,  // older than the runtime that was linked in
  no_device,   // a driver, but no device that this process may see
  failed,      // anything else; `detail` has CUDA's words
};

struct CudaDevice {
  std::string name;
  int32_t major = 0;  // compute capability
  int32_t minor = 0;
  int32_t multiprocessors = 0;
  int64_t memory_bytes = 0;
  bool runnable = false;  // the binary has machine code or PTX that this device can run
};

struct CudaReport {
  CudaStatus status = CudaStatus::not_built;
  std::string detail;           // one sentence; empty when ready
  int32_t runtime_version = 0;  // 13000 for 13.0; 0: none linked in
  int32_t driver_version = 0;   // newest runtime the driver serves; 0: unknown
  std::vector<CudaDevice> devices;
};

namespace cuda {
CudaReport report();
}  // namespace cuda

}  // namespace foretoken

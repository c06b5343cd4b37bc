#include <cuda_runtime.h>
#include <dlfcn.h>

#include "cuda/errors.hpp"
#include "cuda/on_device.hpp"
#include "ops/device.hpp"

namespace foretoken::cuda {

namespace {

constexpr int kOldestDriver = 12040;  // that reads device code compressed as ours is

// Loading it tells whether this binary has code that a device can run.
__global__ void probe_kernel() {}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The runtime reports a missing and an outdated driver with the same error, so the library is looked for
// first.
bool driver_library_exists() {
  void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (library == nullptr) return false;
  dlclose(library);
  return true;
}

CudaReport fail(CudaReport report, CudaStatus status, std::string detail) {
  report.status = status;
  report.detail = std::move(detail);
  return report;
}

CudaDevice describe(int index) {
  CudaDevice device;
  cudaDeviceProp properties{};
  if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) return device;
  device.name = properties.name;
  device.major = properties.major;
  device.minor = properties.minor;
  device.multiprocessors = properties.multiProcessorCount;
  device.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  int previous = 0;
  cudaFuncAttributes attributes{};
  if (cudaGetDevice(&previous) == cudaSuccess && cudaSetDevice(index) == cudaSuccess) {
    device.runnable = cudaFuncGetAttributes(&attributes, probe_kernel) == cudaSuccess;
    cudaSetDevice(previous);
  }
  cudaGetLastError();  // a device we cannot serve is no error of a later call
  return device;
}

}  // namespace

CudaReport report() {
  CudaReport report;
  cudaRuntimeGetVersion(&report.runtime_version);
  if (!driver_library_exists()) {
    return fail(report, CudaStatus::no_driver, "no NVIDIA driver: libcuda.so.1 was not found");
  }
  if (cudaDriverGetVersion(&report.driver_version) != cudaSuccess) report.driver_version = 0;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver) {
    return fail(report, CudaStatus::old_driver,
                "the NVIDIA driver serves CUDA " + version_text(report.driver_version) +
                    ", this build needs a driver for CUDA " + version_text(report.runtime_version));
  }
  if (status == cudaSuccess && report.driver_version < kOldestDriver) {
    return fail(report, CudaStatus::old_driver,
                "the NVIDIA driver serves CUDA " + version_text(report.driver_version) +
                    ", this build needs a driver for CUDA " + version_text(kOldestDriver));
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) {
    return fail(report, CudaStatus::no_device,
                "a driver, but no CUDA device in sight (CUDA_VISIBLE_DEVICES may hide it)");
  }
  if (status != cudaSuccess) return fail(report, CudaStatus::failed, cudaGetErrorString(status));
  report.status = CudaStatus::ready;
  for (int i = 0; i < count; ++i) report.devices.push_back(describe(i));
  return report;
}

OnDevice::OnDevice(Device device) : wanted_(device.index) {
  throw_if_failed(cudaGetDevice(&before_), "current device");
  if (before_ != wanted_) throw_if_failed(cudaSetDevice(wanted_), "current device");
}

OnDevice::~OnDevice() {
  if (before_ != wanted_) cudaSetDevice(before_);
}

bool is_capturing(Device device, Stream stream) {
  const OnDevice current(device);  // whose default stream a null handle is
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream.handle), &status) == cudaSuccess) {
    return status != cudaStreamCaptureStatusNone;
  }
  cudaGetLastError();
  return true;
}

}  // namespace foretoken::cuda

// What `foretoken info` cannot learn from Python: how the binary was built and what it finds on this machine.
#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "build_info.hpp"
#include "cpu/attention_kernels.hpp"
#include "cpu/row_kernels.hpp"
#include "dispatch.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using Report = py::typing::Dict<py::str, py::object>;

const char* name_of(CudaStatus status) {
  switch (status) {
    case CudaStatus::ready: return "ready";
    case CudaStatus::not_built: return "not built";
    case CudaStatus::no_driver: return "no driver";
    case CudaStatus::old_driver: return "old driver";
    case CudaStatus::no_device: return "no device";
    case CudaStatus::failed: return "failed";
  }
  return "";
}

py::list split(const std::string& text, char separator) {
  py::list parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    parts.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

Report build_info_dict() {
  Report info;
  info["compiler"] = build_info::kCompiler;
  info["build_type"] = build_info::kBuildType;
  info["sanitize"] = build_info::kSanitize;
  info["cuda"] = kBuiltWithCuda;
  info["cuda_reason"] = build_info::kCudaReason;
  info["cuda_toolkit"] = build_info::kCudaToolkit;
  info["cuda_architectures"] = split(build_info::kCudaArchitectures, ';');
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

Report cuda_info_dict() {
  CudaReport report;
  {
    py::gil_scoped_release unlocked;  // the first look at a device starts the driver, which takes a while
    report = dispatch::cuda_report();
  }
  py::list devices;
  for (const CudaDevice& device : report.devices) {
    py::dict entry;
    entry["name"] = device.name;
    entry["compute_capability"] = std::to_string(device.major) + "." + std::to_string(device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["memory_bytes"] = device.memory_bytes;
    entry["runnable"] = device.runnable;
    devices.append(entry);
  }
  Report info;
  info["status"] = name_of(report.status);
  info["detail"] = report.detail;
  info["runtime_version"] = report.runtime_version;
  info["driver_version"] = report.driver_version;
  info["devices"] = devices;
  return info;
}

py::list cpu_features() {
  py::list features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // The builtin takes nothing but literals.
  if (__builtin_cpu_supports("avx2")) features.append("avx2");
  if (__builtin_cpu_supports("fma")) features.append("fma");
  if (__builtin_cpu_supports("avx512f")) features.append("avx512f");
  if (__builtin_cpu_supports("avx512bw")) features.append("avx512bw");
  if (__builtin_cpu_supports("avx512dq")) features.append("avx512dq");
  if (__builtin_cpu_supports("avx512vl")) features.append("avx512vl");
#endif
  return features;
}

Report cpu_info_dict() {
  const char* wanted = std::getenv("FORETOKEN_CPU");
  const std::string path = cpu::row_kernels().name;
  std::string reason = "the widest path that this processor has";
  if (wanted != nullptr) {
    reason = path == wanted
                 ? "FORETOKEN_CPU asks for it"
                 : "FORETOKEN_CPU asks for " + std::string(wanted) + ", which this machine or build has not";
  }
  Report info;
  info["path"] = path;
  info["reason"] = reason;
  info["matrix"] = cpu::matrix_kernels();
  info["features"] = cpu_features();
  return info;
}

int num_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace

void register_info(py::module_& module) {
  module.def("build_info", &build_info_dict, "How this binary was built.");
  module.def("cpu_info", &cpu_info_dict, "Which of the compiled row loops runs on this processor, and why.");
  module.def("cuda_info", &cuda_info_dict, "The CUDA runtime, driver and devices, or why there are none.");
  module.def("num_threads", &num_threads,
             "Threads the native loops use at most; torch.set_num_threads sets it.");
}

}  // namespace foretoken

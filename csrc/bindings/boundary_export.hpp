// How tensors leave their framework: the DLPack C exchange table on the object's type where there is one
// (torch 2.10 and newer; ~60 ns), the __dlpack__ method otherwise (NumPy, older torch; microseconds).
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "third_party/dlpack/dlpack.h"

namespace foretoken::boundary {

namespace py = pybind11;

struct Exported {
  DLTensor tensor;          // shape and strides are borrowed from the object, or from `managed`
  bool read_only = false;   // the exchange table has no such flag: torch tensors are always writable
  void* managed = nullptr;  // owned by the caller, who returns it with release_managed
  bool versioned = false;   // managed is a DLManagedTensorVersioned, else a DLManagedTensor
  const DLPackExchangeAPI* exchange = nullptr;
};

struct Refusal {
  bool wrong_kind = false;  // not a tensor at all: TypeError. Otherwise ValueError
  std::string got;          // completes "expected ..., got "
};

// False: `object` has no plain memory to look at, and `refusal` says why. Never leaves a Python error set.
bool export_tensor(py::handle object, Exported& out, Refusal& refusal);

void release_managed(void* managed, bool versioned) noexcept;

// "float32", "complex64", "float8_e4m3fn".
std::string dtype_name(DLDataType dtype);

}  // namespace foretoken::boundary

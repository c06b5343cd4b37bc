// Lazily negated torch tensors (`x.conj().imag`, `torch._neg_view`) keep the sign in a dispatch bit that
// DLPack does not carry, so their memory read as it is has the wrong sign. `is_neg()` would tell, but it
// costs more than the whole export and gives up the GIL, once for every argument of every call.
//
// The bit is in a 64-bit word of the tensor that torch will also print (`torch._C._dispatch_keys`). We
// compare, once a process and on specimens of both kinds, the printed words with the objects' memory; that
// finds where the word lies in this very torch. Where it is not found, is_neg() is called after all.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>

namespace foretoken::boundary {

namespace py = pybind11;

class LazyNegation {
 public:
  // Learns the layout from the torch module. Python errors on the way mean "not found".
  explicit LazyNegation(py::handle torch);

  bool found() const { return found_; }

  // `tensor`: an instance of torch.Tensor.
  bool is_negated(py::handle tensor) const {
    if (!found_) return ask(tensor);
    const char* impl = *at<const char*>(tensor.ptr(), impl_offset_);
    return impl != nullptr && (*at<uint64_t>(impl, keys_offset_) & negative_bit_) != 0;
  }

 private:
  template <typename T>
  static const T* at(const void* base, int offset) {
    return reinterpret_cast<const T*>(static_cast<const char*>(base) + offset);
  }
  static bool ask(py::handle tensor);

  bool found_ = false;
  int impl_offset_ = 0;  // in the Python object: pointer to the tensor's implementation
  int keys_offset_ = 0;  // in the implementation: its dispatch keys
  uint64_t negative_bit_ = 0;
};

}  // namespace foretoken::boundary

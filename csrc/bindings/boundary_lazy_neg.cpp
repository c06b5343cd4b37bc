#include "bindings/boundary_lazy_neg.hpp"

#include <vector>

namespace foretoken::boundary {

namespace {

constexpr int kWord = 8;
constexpr int kImplWords = 26;  // no torch since 2.0 has a smaller TensorImpl in front of its keys

struct Specimen {
  const char* object;
  const char* impl;
  uint64_t keys;
};

uint64_t word_at(const char* base, int offset) {
  uint64_t word;
  std::memcpy(&word, base + offset, sizeof word);
  return word;
}

Specimen examine(py::handle torch, py::handle tensor) {
  return {reinterpret_cast<const char*>(tensor.ptr()),
          reinterpret_cast<const char*>(tensor.attr("_cdata").cast<uintptr_t>()),
          torch.attr("_C").attr("_dispatch_keys")(tensor).attr("raw_repr")().cast<uint64_t>()};
}

// First offset at which every specimen has its word, or -1.
template <typename Matches>
int find_offset(const std::vector<Specimen>& specimens, int first, int end, Matches matches) {
  for (int offset = first; offset < end; offset += kWord) {
    bool all = true;
    for (const Specimen& specimen : specimens) all = all && matches(specimen, offset);
    if (all) return offset;
  }
  return -1;
}

}  // namespace

LazyNegation::LazyNegation(py::handle torch) {
  try {
    const py::object plain = torch.attr("zeros")(3);
    const py::object negated = torch.attr("_neg_view")(plain);
    const py::object integers = plain.attr("long")();
    const py::object parameter = torch.attr("nn").attr("Parameter")(plain);
    std::vector<Specimen> specimens;
    for (const py::object& tensor : {plain, negated, integers, parameter}) {
      specimens.push_back(examine(torch, tensor));
    }
    const int object_bytes = static_cast<int>(Py_TYPE(plain.ptr())->tp_basicsize);
    const int impl_offset = find_offset(
        specimens, static_cast<int>(sizeof(PyObject)), object_bytes, [](const Specimen& s, int offset) {
          return word_at(s.object, offset) == reinterpret_cast<uintptr_t>(s.impl);
        });
    const int keys_offset = find_offset(specimens, 0, kImplWords * kWord, [](const Specimen& s, int offset) {
      return word_at(s.impl, offset) == s.keys;
    });
    const uint64_t differs = specimens[0].keys ^ specimens[1].keys;
    const bool one_bit = differs != 0 && (differs & (differs - 1)) == 0;
    if (impl_offset < 0 || keys_offset < 0 || !one_bit) return;
    impl_offset_ = impl_offset;
    keys_offset_ = keys_offset;
    negative_bit_ = differs;
    found_ = true;
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("foretoken: looking for torch's negative bit");
  } catch (const py::cast_error&) {
  }
}

bool LazyNegation::ask(py::handle tensor) { return tensor.attr("is_neg")().cast<bool>(); }

}  // namespace foretoken::boundary

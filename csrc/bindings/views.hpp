// NumPy views of arrays that a native object owns; the view keeps the object alive.
#pragma once

#include <pybind11/numpy.h>

#include <vector>

namespace foretoken::boundary {

template <typename T>
pybind11::array_t<T> view_of(std::vector<T>& values, pybind11::handle owner) {
  return pybind11::array_t<T>({static_cast<pybind11::ssize_t>(values.size())}, {sizeof(T)}, values.data(),
                              owner);
}

}  // namespace foretoken::boundary

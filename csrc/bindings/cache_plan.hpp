// The tensors of a compaction, checked once and laid out for the kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bindings/boundary.hpp"
#include "ops/pages.hpp"

namespace foretoken {

class CachePlan {
 public:
  // `heads_first`: tensors of rank 4 are [pages, Hk, page_size, D] instead of [pages, page_size, Hk, D].
  CachePlan(pybind11::tuple caches, bool heads_first);
  CachePlan(const CachePlan&) = delete;
  CachePlan& operator=(const CachePlan&) = delete;

  bool needs_table() const { return device_.type == DeviceType::cuda && units_ == nullptr; }
  pybind11::bytes table() const;            // what has to lie on the device
  void attach(pybind11::object on_device);  // uint8, as table() gave it

  Device device() const { return device_; }
  int64_t pages() const { return pages_; }
  int64_t page_size() const { return page_size_; }
  // Refuses an argument of a call in the memory of one of the tensors.
  void check_apart(const TensorView& view, const char* name) const;
  void describe(CompactArgs& args) const;
  void describe(CopyPagesArgs& args) const;

 private:
  struct Range {
    uintptr_t low, high;
  };

  void add(boundary::Intake& intake, pybind11::handle cache, const char* name, bool heads_first);
  void add_units(const CacheTensor& tensor);

  pybind11::tuple caches_;  // kept alive
  pybind11::object on_device_ = pybind11::none();
  const CacheUnit* units_ = nullptr;
  Device device_;
  int64_t pages_ = 0, page_size_ = 0;
  std::vector<CacheTensor> tensors_;
  std::vector<CacheUnit> host_units_;
  std::vector<Range> ranges_;
  std::vector<std::string> names_;
};

}  // namespace foretoken

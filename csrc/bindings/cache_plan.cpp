#include "bindings/cache_plan.hpp"

#include <algorithm>

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::DTypes;
using boundary::Intake;
using boundary::Layout;

constexpr DTypes kAnyDType = boundary::kRealDTypes | boundary::kFloat8DTypes | boundary::kIndexDTypes |
                             DType::float64 | DType::uint8 | DType::boolean;
constexpr int64_t kLanes = 32;                       // columns of a unit
constexpr int64_t kMostRowBytes = int64_t{1} << 30;  // of one tensor: columns are counted in 32 bits

// A unit's columns are as wide as every run of every row is aligned, up to 16 bytes.
int64_t width_of(const CacheTensor& tensor) {
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.data) % 16);
  int64_t width = 16;
  for (const int64_t number :
       {address, tensor.page_stride, tensor.row_stride, tensor.part_stride, tensor.part_bytes}) {
    while (number % width != 0) width /= 2;
  }
  return width;
}

// Dimensions that follow one another without a gap are one run.
void join_parts(CacheTensor& tensor) {
  if (tensor.parts > 1 && tensor.part_stride != tensor.part_bytes) return;
  tensor.part_bytes *= tensor.parts;
  tensor.part_stride = tensor.part_bytes;
  tensor.parts = 1;
}

}  // namespace

CachePlan::CachePlan(py::tuple caches, bool heads_first) : caches_(std::move(caches)) {
  if (caches_.empty()) throw py::value_error("caches: expected at least one tensor, got none");
  Intake intake("compact");
  for (size_t i = 0; i < caches_.size(); ++i) names_.push_back("caches[" + std::to_string(i) + "]");
  for (size_t i = 0; i < caches_.size(); ++i) add(intake, caches_[i], names_[i].c_str(), heads_first);
  device_ = intake.device();
}

void CachePlan::add(Intake& intake, py::handle cache, const char* name, bool heads_first) {
  const int rank = intake.rank_of(cache, name);
  if (rank < 2 || rank > 4) {
    throw py::value_error(std::string(name) + ": expected 2 to 4 dimensions, got " + std::to_string(rank));
  }
  int64_t pages = 0, page_size = 0, heads = 1, size = 1;
  const bool first = tensors_.empty();
  const Dim page_dim = first ? Dim::bind(pages, "pages") : Dim::is(pages_);
  const Dim row_dim = first ? Dim::bind(page_size, "page_size", 1) : Dim::is(page_size_);
  const Dim head_dim = Dim::bind(heads, "Hk", 1), size_dim = Dim::bind(size, "D", 1);
  const bool swapped = rank == 4 && heads_first;
  TensorView view;
  if (rank == 2) {
    view = intake.write(cache, name, kAnyDType, {page_dim, row_dim}, Layout::any);
  } else if (rank == 3) {
    view = intake.write(cache, name, kAnyDType, {page_dim, row_dim, size_dim});
  } else if (swapped) {
    view = intake.write(cache, name, kAnyDType, {page_dim, head_dim, row_dim, size_dim});
  } else {
    view = intake.write(cache, name, kAnyDType, {page_dim, row_dim, head_dim, size_dim});
  }
  if (first) {
    pages_ = view.shape[0];
    page_size_ = view.shape[swapped ? 2 : 1];
  }
  const int64_t element = bytes_of(view.dtype);
  CacheTensor tensor;
  tensor.data = static_cast<char*>(view.data);
  tensor.page_stride = view.strides[0] * element;
  tensor.row_stride = view.strides[swapped ? 2 : 1] * element;
  tensor.parts = heads;
  tensor.part_stride = rank == 4 ? view.strides[swapped ? 1 : 2] * element : 0;
  tensor.part_bytes = size * element;
  if (heads > kMostRowBytes / tensor.part_bytes) {
    throw py::value_error(std::string(name) + ": expected rows of at most " + std::to_string(kMostRowBytes) +
                          " bytes, got " + std::to_string(heads) + " heads of " +
                          std::to_string(tensor.part_bytes));
  }
  join_parts(tensor);
  tensors_.push_back(tensor);
  add_units(tensor);
  uintptr_t reach = static_cast<uintptr_t>(element);
  for (int i = 0; i < view.rank; ++i) {
    reach += static_cast<uintptr_t>(std::max<int64_t>(view.shape[i] - 1, 0) * view.strides[i] * element);
  }
  const auto low = reinterpret_cast<uintptr_t>(view.data);
  ranges_.push_back({low, low + reach});
}

void CachePlan::add_units(const CacheTensor& tensor) {
  const int64_t width = width_of(tensor), per_part = tensor.part_bytes / width;
  const int64_t columns = tensor.parts * per_part;
  for (int64_t column = 0; column < columns; column += kLanes) {
    CacheUnit unit;
    unit.data = tensor.data;
    unit.page_stride = tensor.page_stride;
    unit.row_stride = tensor.row_stride;
    unit.part_stride = tensor.part_stride;
    unit.first = static_cast<int32_t>(column);
    unit.count = static_cast<int32_t>(std::min(kLanes, columns - column));
    unit.per_part = static_cast<int32_t>(per_part);
    unit.width = static_cast<int32_t>(width);
    host_units_.push_back(unit);
  }
}

py::bytes CachePlan::table() const {
  return {reinterpret_cast<const char*>(host_units_.data()), host_units_.size() * sizeof(CacheUnit)};
}

void CachePlan::attach(py::object on_device) {
  Intake intake("compact", device_);
  const auto bytes = static_cast<int64_t>(host_units_.size() * sizeof(CacheUnit));
  const TensorView view = intake.read(on_device, "table", DType::uint8, {bytes}, Layout::contiguous);
  if (reinterpret_cast<uintptr_t>(view.data) % alignof(CacheUnit) != 0) {
    throw py::value_error("table: expected memory aligned to 16 bytes, got an odd address");
  }
  on_device_ = std::move(on_device);
  units_ = static_cast<const CacheUnit*>(view.data);
}

void CachePlan::check_apart(const TensorView& view, const char* name) const {
  if (!view) return;
  const auto low = reinterpret_cast<uintptr_t>(view.data);
  auto high = low + static_cast<uintptr_t>(bytes_of(view.dtype));
  for (int i = 0; i < view.rank; ++i) {
    if (view.shape[i] == 0) return;
    high += static_cast<uintptr_t>((view.shape[i] - 1) * view.strides[i] * bytes_of(view.dtype));
  }
  for (size_t i = 0; i < ranges_.size(); ++i) {
    if (high <= ranges_[i].low || ranges_[i].high <= low) continue;
    throw py::value_error(std::string(name) + ": expected memory of its own, got memory shared with " +
                          names_[i] + ", which is written");
  }
}

void CachePlan::describe(CompactArgs& args) const {
  args.tensors = tensors_.data();
  args.num_tensors = static_cast<int64_t>(tensors_.size());
  args.units = units_;
  args.num_units = static_cast<int64_t>(host_units_.size());
}

void CachePlan::describe(CopyPagesArgs& args) const {
  args.tensors = tensors_.data();
  args.num_tensors = static_cast<int64_t>(tensors_.size());
  args.units = units_;
  args.num_units = static_cast<int64_t>(host_units_.size());
  args.page_size = page_size_;
}

}  // namespace foretoken

// ops.append, ops.compact and ops.CachePlan.
#include <pybind11/pybind11.h>

#include "bindings/boundary.hpp"
#include "bindings/cache_plan.hpp"
#include "dispatch.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::DTypes;
using boundary::Intake;
using boundary::kFloat8DTypes;
using boundary::kIndexDTypes;
using boundary::kRealDTypes;
using boundary::Layout;

constexpr int64_t kMostRowElements = int64_t{1} << 28;  // columns of a row are counted in 32 bits

// `owner` names what has the pages.
CachePages read_pages(Intake& intake, py::handle block_table, int64_t batch, int64_t pages, int64_t page_size,
                      const char* owner) {
  CachePages found;
  found.pages = pages;
  found.page_size = page_size;
  found.capacity = page_size;
  if (block_table.is_none()) {
    if (pages < batch) {
      throw py::value_error(std::string(owner) + ": expected the slots of at least " + std::to_string(batch) +
                            " requests (one per row, as block_table is None), got " + std::to_string(pages));
    }
  } else {
    int64_t columns = 0;
    found.block_table = intake.read(block_table, "block_table", kIndexDTypes,
                                    {batch, Dim::bind(columns, "columns")}, Layout::any);
    found.capacity = columns > kMostSlots / page_size ? kMostSlots : columns * page_size;
  }
  if (found.capacity >= kMostSlots) {
    throw py::value_error(std::string(block_table.is_none() ? owner : "block_table") +
                          ": expected fewer than 2**32 slots a request, got more");
  }
  return found;
}

struct Sizes {
  int64_t batch = 0, rows = 0, heads = 0, pages = 0, page_size = 0;
};

struct Names {
  const char *rows, *cache, *scale;
};

// The first half of a call says how large batch, pages and the like are, the second has to agree.
class Halves {
 public:
  Halves(Intake& intake, bool heads_first) : intake_(intake), heads_first_(heads_first) {}

  AppendHalf read(const Names& names, py::handle rows, py::handle cache, py::handle scale) {
    AppendHalf half;
    int64_t size = 0;
    const Dim size_dim = Dim::bind(size, "D", 1);
    half.rows =
        intake_.read(rows, names.rows, kRealDTypes | kFloat8DTypes,
                     {dim(sizes_.batch, "B"), dim(sizes_.rows, "T"), dim(sizes_.heads, "Hk", 1), size_dim});
    const DTypes stored =
        kRealDTypes.has(half.rows.dtype) ? DTypes(half.rows.dtype) | kFloat8DTypes : half.rows.dtype;
    if (sizes_.heads > kMostRowElements / size) {
      throw py::value_error(std::string(names.rows) + ": expected at most " +
                            std::to_string(kMostRowElements) + " elements a row, got " +
                            std::to_string(sizes_.heads) + " heads of " + std::to_string(size));
    }
    const Dim pages = dim(sizes_.pages, "pages"), page_size = dim(sizes_.page_size, "page_size", 1);
    if (heads_first_) {
      half.cache = intake_.write(cache, names.cache, stored, {pages, sizes_.heads, page_size, size});
      std::swap(half.cache.shape[1], half.cache.shape[2]);
      std::swap(half.cache.strides[1], half.cache.strides[2]);
    } else {
      half.cache = intake_.write(cache, names.cache, stored, {pages, page_size, sizes_.heads, size});
    }
    half.scale = read_scale(names, half, scale);
    known_ = true;
    return half;
  }

  const Sizes& sizes() const { return sizes_; }

 private:
  Dim dim(int64_t& size, const char* label, int64_t minimum = 0) const {
    return known_ ? Dim::is(size) : Dim::bind(size, label, minimum);
  }

  TensorView read_scale(const Names& names, const AppendHalf& half, py::handle scale) {
    if (scale.is_none()) return {};
    if (half.rows.dtype == half.cache.dtype) {
      throw py::value_error(std::string(names.scale) + ": expected None, as " + names.cache +
                            " keeps the dtype of " + names.rows + ", got a scale");
    }
    if (intake_.rank_of(scale, names.scale) == 0) {
      return one_for_all(intake_.read(scale, names.scale, DType::float32, {}, Layout::any));
    }
    const bool single = intake_.sizes_of(scale, names.scale, 1)[0] == 1;
    const TensorView view =
        intake_.read(scale, names.scale, DType::float32, {single ? int64_t{1} : sizes_.heads}, Layout::any);
    return single ? one_for_all(view) : view;
  }

  static TensorView one_for_all(TensorView view) {
    view.strides[0] = 0;
    return view;
  }

  Intake& intake_;
  bool heads_first_, known_ = false;
  Sizes sizes_;
};

void append(py::handle k, py::handle v, py::handle k_cache, py::handle v_cache, py::handle lengths,
            py::handle num_nodes, py::handle block_table, py::handle k_scale, py::handle v_scale,
            bool heads_first, py::handle status) {
  Intake intake("append");
  Halves halves(intake, heads_first);
  AppendArgs args;
  args.halves[0] = halves.read({"k", "k_cache", "k_scale"}, k, k_cache, k_scale);
  args.halves[1] = halves.read({"v", "v_cache", "v_scale"}, v, v_cache, v_scale);
  const Sizes& sizes = halves.sizes();
  args.pages = read_pages(intake, block_table, sizes.batch, sizes.pages, sizes.page_size, "k_cache");
  args.lengths = intake.read(lengths, "lengths", kIndexDTypes, {sizes.batch}, Layout::any);
  args.num_nodes = intake.read_or_null(num_nodes, "num_nodes", DType::int32, {sizes.batch}, Layout::any);
  args.status = intake.write(status, "status", DType::int32, {sizes.batch}, Layout::any);
  const Device device = intake.device();
  const Stream stream = intake.stream();
  py::gil_scoped_release unlocked;
  dispatch::append(args, device, stream);
}

void compact(const CachePlan& plan, py::handle lengths, py::handle path, py::handle num_accepted,
             py::handle block_table, py::handle status) {
  if (plan.needs_table()) throw py::value_error("caches: expected a plan with its table, got one without");
  Intake intake("compact", plan.device());
  CompactArgs args;
  int64_t batch = 0, depth = 0;
  args.path =
      intake.read(path, "path", kIndexDTypes, {Dim::bind(batch, "B"), Dim::bind(depth, "D")}, Layout::any);
  if (depth > kMostPathNodes) {
    throw py::value_error("path: expected at most " + std::to_string(kMostPathNodes) + " nodes, got " +
                          std::to_string(depth));
  }
  args.lengths = intake.read(lengths, "lengths", kIndexDTypes, {batch}, Layout::any);
  args.num_accepted = intake.read(num_accepted, "num_accepted", DType::int32, {batch}, Layout::any);
  args.pages = read_pages(intake, block_table, batch, plan.pages(), plan.page_size(), "caches");
  args.status = intake.write(status, "status", DType::int32, {batch}, Layout::any);
  plan.check_apart(args.path, "path");
  plan.check_apart(args.lengths, "lengths");
  plan.check_apart(args.num_accepted, "num_accepted");
  plan.check_apart(args.pages.block_table, "block_table");
  plan.check_apart(args.status, "status");
  plan.describe(args);
  const Stream stream = intake.stream();
  py::gil_scoped_release unlocked;
  dispatch::compact(args, plan.device(), stream);
}

}  // namespace

void register_cache(py::module_& module) {
  py::class_<CachePlan>(module, "CachePlan", "See foretoken.ops.CachePlan.")
      .def(py::init<py::tuple, bool>(), py::arg("caches"), py::arg("heads_first"))
      .def_property_readonly("needs_table", &CachePlan::needs_table, "Nothing is on the device yet.")
      .def("table", &CachePlan::table, "Bytes that have to lie on the device.")
      .def("attach", &CachePlan::attach, py::arg("on_device"), "Take the table's copy on the device.");
  module.def("append", &append, py::arg("k"), py::arg("v"), py::arg("k_cache"), py::arg("v_cache"),
             py::arg("lengths"), py::arg("num_nodes"), py::arg("block_table"), py::arg("k_scale"),
             py::arg("v_scale"), py::arg("heads_first"), py::arg("status"), "See foretoken.ops.append.");
  module.def("compact", &compact, py::arg("plan"), py::arg("lengths"), py::arg("path"),
             py::arg("num_accepted"), py::arg("block_table"), py::arg("status"),
             "See foretoken.ops.compact.");
}

}  // namespace foretoken

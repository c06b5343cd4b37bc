// ops.tree_attention and ops.merge.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <string>
#include <utility>

#include "bindings/boundary.hpp"
#include "dispatch.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::DTypes;
using boundary::Intake;
using boundary::kIndexDTypes;
using boundary::kRealDTypes;

constexpr auto kAny = boundary::Layout::any;

struct Sizes {
  int64_t batch = 0, nodes = 0, heads = 0, size = 0, kv_heads = 0;
};

[[noreturn]] void refuse(const char* name, const std::string& expected, const std::string& got) {
  throw py::value_error(std::string(name) + ": expected " + expected + ", got " + got);
}

void check_head_size(const char* name, int64_t size) {
  if (size > kMaxHeadSize) {
    refuse(name, "heads of at most " + std::to_string(kMaxHeadSize), std::to_string(size));
  }
}

void read_query(Intake& intake, py::handle q, TreeAttentionArgs& args, Sizes& size) {
  args.q = intake.read(q, "q", kRealDTypes,
                       {Dim::bind(size.batch, "B"), Dim::bind(size.nodes, "T"),
                        Dim::bind(size.heads, "Hq", 1), Dim::bind(size.size, "D", 1)});
  if (size.nodes > kMaxNodes) {
    refuse("q", "at most " + std::to_string(kMaxNodes) + " nodes a row", std::to_string(size.nodes));
  }
  check_head_size("q", size.size);
}

// A cache as [rows or pages, slots, Hk, D], whatever the order of its middle dimensions.
TensorView read_cache(Intake& intake, py::handle cache, const char* name, DTypes dtypes, const Dim& rows,
                      const Dim& slots, const Dim& kv_heads, int64_t size, bool heads_first) {
  TensorView view = heads_first ? intake.read(cache, name, dtypes, {rows, kv_heads, slots, size})
                                : intake.read(cache, name, dtypes, {rows, slots, kv_heads, size});
  if (heads_first) {
    std::swap(view.shape[1], view.shape[2]);
    std::swap(view.strides[1], view.strides[2]);
  }
  return view;
}

void read_caches(Intake& intake, py::handle k_cache, py::handle v_cache, py::handle block_table,
                 bool heads_first, TreeAttentionArgs& args, Sizes& size) {
  const bool paged = !block_table.is_none();
  const DTypes dtypes = DTypes(args.q.dtype) | boundary::kFloat8DTypes;
  int64_t rows = 0, slots = 0, per_row = 0;
  const Dim any_rows = Dim::bind(rows, "P", 1);
  args.k_cache = read_cache(intake, k_cache, "k_cache", dtypes, paged ? any_rows : Dim(size.batch),
                            paged ? Dim::bind(slots, "page", 1) : Dim::bind(slots, "S"),
                            Dim::bind(size.kv_heads, "Hk", 1), size.size, heads_first);
  args.v_cache = read_cache(intake, v_cache, "v_cache", DTypes(args.k_cache.dtype), args.k_cache.shape[0],
                            slots, size.kv_heads, size.size, heads_first);
  args.block_table = intake.read_or_null(block_table, "block_table", DType::int32,
                                         {size.batch, Dim::bind(per_row, "pages a row")}, kAny);
  const int64_t group = size.heads / size.kv_heads;
  if (size.heads % size.kv_heads != 0 || group > kMaxGroup) {
    refuse("k_cache",
           "kv heads that " + std::to_string(size.heads) + " query heads are a multiple of, 1 to " +
               std::to_string(kMaxGroup) + " times as many",
           std::to_string(size.kv_heads) + " kv heads");
  }
}

TensorView read_scales(Intake& intake, py::handle scales, const char* name, int64_t kv_heads) {
  int64_t count = 0;
  const TensorView view =
      intake.read_or_null(scales, name, DType::float32, {Dim::bind(count, "1 or Hk", 1)}, kAny);
  if (view && count != 1 && count != kv_heads) {
    refuse(name, "1 or " + std::to_string(kv_heads) + " numbers", std::to_string(count));
  }
  return view;
}

void read_numbers(TreeAttentionArgs& args, std::optional<double> scale, std::optional<double> softcap,
                  std::optional<int64_t> window, int64_t size) {
  const double factor = scale.value_or(1.0 / std::sqrt(static_cast<double>(size)));
  if (!std::isfinite(factor)) refuse("scale", "a finite number", std::to_string(factor));
  if (softcap && !(*softcap > 0.0 && std::isfinite(*softcap))) {
    refuse("softcap", "a positive number or None", std::to_string(*softcap));
  }
  if (window && *window < 1) refuse("window", "1 position and more or None", std::to_string(*window));
  args.scale = static_cast<float>(factor);
  args.softcap = static_cast<float>(softcap.value_or(0.0));
  args.window = window.value_or(0);
}

bool heads_first(const std::string& layout) {
  if (layout != "NHD" && layout != "HND") refuse("layout", "'NHD' or 'HND'", "'" + layout + "'");
  return layout == "HND";
}

// Bytes of device scratch that are missing: then nothing was done, and the call is to be made again with a
// workspace of that size, all zero. 0: done.
int64_t tree_attention(py::handle q, py::handle k_cache, py::handle v_cache, py::handle lengths,
                       py::handle num_nodes, py::handle ancestors, py::handle block_table,
                       const std::string& layout, std::optional<double> scale, std::optional<double> softcap,
                       std::optional<int64_t> window, py::handle sinks, py::handle k_scale,
                       py::handle v_scale, py::handle out, py::handle lse, py::handle workspace) {
  Intake intake("tree_attention");
  TreeAttentionArgs args;
  Sizes size;
  read_query(intake, q, args, size);
  read_caches(intake, k_cache, v_cache, block_table, heads_first(layout), args, size);
  args.lengths = intake.read(lengths, "lengths", kIndexDTypes, {size.batch}, kAny);
  args.num_nodes = intake.read_or_null(num_nodes, "num_nodes", DType::int32, {size.batch}, kAny);
  args.ancestors = intake.read_or_null(ancestors, "ancestors", DType::int64,
                                       {size.batch, size.nodes, words_of(size.nodes)}, kAny);
  args.sinks = intake.read_or_null(sinks, "sinks", DType::float32, {size.heads}, kAny);
  args.k_scale = read_scales(intake, k_scale, "k_scale", size.kv_heads);
  args.v_scale = read_scales(intake, v_scale, "v_scale", size.kv_heads);
  read_numbers(args, scale, softcap, window, size.size);
  args.out = intake.write(out, "out", args.q.dtype, {size.batch, size.nodes, size.heads, size.size});
  args.lse = intake.write_or_null(lse, "lse", DType::float32, {size.batch, size.nodes, size.heads}, kAny);
  int64_t room = 0;
  const TensorView scratch =
      intake.write_or_null(workspace, "workspace", DType::uint8, {Dim::bind(room, "bytes")});
  const Device device = intake.device();
  const int64_t needed = dispatch::tree_attention_workspace(args, device);
  if (needed > room) return needed;
  const Stream stream = intake.stream();
  py::gil_scoped_release unlocked;
  dispatch::tree_attention(args, scratch.data, device, stream);
  return 0;
}

void merge(py::handle out_a, py::handle lse_a, py::handle out_b, py::handle lse_b, py::handle out,
           py::handle lse) {
  Intake intake("merge");
  MergeArgs args;
  int64_t batch = 0, nodes = 0, heads = 0, size = 0;
  args.out_a = intake.read(
      out_a, "out_a", kRealDTypes,
      {Dim::bind(batch, "B"), Dim::bind(nodes, "T"), Dim::bind(heads, "Hq"), Dim::bind(size, "D")});
  check_head_size("out_a", size);
  const DTypes same = args.out_a.dtype;
  args.lse_a = intake.read(lse_a, "lse_a", DType::float32, {batch, nodes, heads}, kAny);
  args.out_b = intake.read(out_b, "out_b", same, {batch, nodes, heads, size});
  args.lse_b = intake.read(lse_b, "lse_b", DType::float32, {batch, nodes, heads}, kAny);
  args.out = intake.write(out, "out", same, {batch, nodes, heads, size});
  args.lse = intake.write(lse, "lse", DType::float32, {batch, nodes, heads}, kAny);
  const Device device = intake.device();
  const Stream stream = intake.stream();
  py::gil_scoped_release unlocked;
  dispatch::merge(args, device, stream);
}

}  // namespace

void register_attention(py::module_& module) {
  module.def("tree_attention", &tree_attention, py::arg("q"), py::arg("k_cache"), py::arg("v_cache"),
             py::arg("lengths"), py::arg("num_nodes"), py::arg("ancestors"), py::arg("block_table"),
             py::arg("layout"), py::arg("scale"), py::arg("softcap"), py::arg("window"), py::arg("sinks"),
             py::arg("k_scale"), py::arg("v_scale"), py::arg("out"), py::arg("lse"), py::arg("workspace"),
             "See foretoken.ops.tree_attention. Returns the bytes of workspace that are missing; 0: done.");
  module.def("merge", &merge, py::arg("out_a"), py::arg("lse_a"), py::arg("out_b"), py::arg("lse_b"),
             py::arg("out"), py::arg("lse"), "See foretoken.ops.merge.");
}

}  // namespace foretoken

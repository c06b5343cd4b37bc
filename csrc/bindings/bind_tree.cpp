#include <pybind11/pybind11.h>

#include "bindings/boundary.hpp"
#include "dispatch.hpp"
#include "math/tree_index.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::Intake;

void check_positions(py::handle lengths, py::handle positions) {
  if (lengths.is_none() == positions.is_none()) return;
  throw py::value_error(lengths.is_none()
                            ? "lengths: expected int64 [B] beside out.positions, got None"
                            : "out.positions: expected int64 [B, N + 1] beside lengths, got None");
}

void tree_index(py::handle parents, py::handle num_drafts, py::handle lengths, py::handle depth,
                py::handle first_child, py::handle next_sibling, py::handle ancestors, py::handle positions,
                py::handle status) {
  constexpr auto any = boundary::Layout::any;
  Intake intake("tree_index");
  TreeIndexArgs args;
  int64_t batch = 0, drafts = 0;
  args.parents = intake.read(parents, "parents", boundary::kIndexDTypes,
                             {Dim::bind(batch, "B"), Dim::bind(drafts, "N")}, any);
  const int64_t nodes = drafts + 1, words = words_of(nodes);
  if (nodes > kMaxNodes) {
    throw py::value_error("parents: expected at most " + std::to_string(kMaxNodes - 1) +
                          " drafts a row, got " + std::to_string(drafts));
  }
  args.num_drafts = intake.read_or_null(num_drafts, "num_drafts", DType::int32, {batch}, any);
  args.lengths = intake.read_or_null(lengths, "lengths", DType::int64, {batch}, any);
  check_positions(lengths, positions);
  args.depth = intake.write(depth, "out.depth", DType::int32, {batch, nodes}, any);
  args.first_child = intake.write(first_child, "out.first_child", DType::int32, {batch, nodes}, any);
  args.next_sibling = intake.write(next_sibling, "out.next_sibling", DType::int32, {batch, nodes}, any);
  args.ancestors = intake.write(ancestors, "out.ancestors", DType::int64, {batch, nodes, words}, any);
  args.positions = intake.write_or_null(positions, "out.positions", DType::int64, {batch, nodes}, any);
  args.status = intake.write(status, "out.status", DType::int32, {batch}, any);
  const Device device = intake.device();
  const Stream stream = intake.stream();
  py::gil_scoped_release unlocked;
  dispatch::tree_index(args, device, stream);
}

}  // namespace

void register_tree(py::module_& module) {
  module.def("tree_index", &tree_index, py::arg("parents"), py::arg("num_drafts"), py::arg("lengths"),
             py::arg("depth"), py::arg("first_child"), py::arg("next_sibling"), py::arg("ancestors"),
             py::arg("positions"), py::arg("status"), "See foretoken.ops.tree_index.");
}

}  // namespace foretoken

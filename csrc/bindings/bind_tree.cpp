#include <pybind11/pybind11.h>

#include "bindings/boundary.hpp"
#include "bindings/op_checks.hpp"
#include "dispatch.hpp"
#include "math/tree_index.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::Intake;

void tree_index(py::handle parents, py::handle num_drafts, py::handle lengths, py::handle depth,
                py::handle first_child, py::handle next_sibling, py::handle ancestors, py::handle positions,
                py::handle status) {
  constexpr auto any = boundary::Layout::any;
  Intake intake("tree_index");
  TreeIndexArgs args;
  int64_t batch = 0, drafts = 0;
  args.parents = intake.read(parents, "parents", boundary::kIndexDTypes,
                             {Dim::bind(batch, "B"), Dim::bind(drafts, "N")}, any);
  if (drafts > kMaxDrafts) {
    throw py::value_error("parents: expected at most " + std::to_string(kMaxDrafts) + " drafts a row, got " +
                          std::to_string(drafts));
  }
  args.num_drafts = intake.read_or_null(num_drafts, "num_drafts", DType::int32, {batch}, any);
  args.lengths = intake.read_or_null(lengths, "lengths", DType::int64, {batch}, any);
  check_positions(lengths, positions);
  write_index_arrays(intake, args, batch, drafts, depth, first_child, next_sibling, ancestors, positions,
                     status);
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

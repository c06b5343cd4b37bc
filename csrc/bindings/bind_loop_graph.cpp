// Rounds that the device repeats by itself.
#include <pybind11/pybind11.h>

#include "bindings/boundary.hpp"
#include "dispatch.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::Intake;

std::unique_ptr<dispatch::LoopGraph> make_loop(uintptr_t graph, py::handle next_drafts, py::handle slots,
                                               py::handle record, py::handle history, py::handle most_rounds,
                                               py::handle progress) {
  Intake intake("LoopGraph");
  LoopGraphArgs args;
  int64_t batch = 0, slot_count = 0, width = 0, rounds = 0;
  args.next_drafts = intake.read(next_drafts, "next_drafts", DType::int32, {Dim::bind(slot_count, "S", 1)});
  args.slots = intake.read(slots, "slots", DType::int32, {Dim::bind(batch, "B", 1)});
  args.record = intake.read_or_null(record, "record", DType::int32, {batch, Dim::bind(width, "W", 1)});
  args.history =
      intake.write_or_null(history, "history", DType::int32, {Dim::bind(rounds, "R", 1), batch, width});
  args.most_rounds = intake.read(most_rounds, "most_rounds", DType::int32, {1});
  args.progress =
      intake.write(progress, "progress", DType::int32, {kLoopFields}, boundary::Layout::contiguous);
  if (bool(args.record) != bool(args.history)) {
    throw py::value_error("history: expected one beside a record, and none without");
  }
  if (graph == 0) throw py::value_error("graph: expected the handle of a captured graph, got 0");
  const Device device = intake.device();
  py::gil_scoped_release unlocked;
  return std::make_unique<dispatch::LoopGraph>(args, reinterpret_cast<void*>(graph), device);
}

void launch(dispatch::LoopGraph& loop, uintptr_t stream) {
  loop.launch(Stream{reinterpret_cast<void*>(stream)});
}

}  // namespace

void register_loop_graph(py::module_& module) {
  py::class_<dispatch::LoopGraph>(module, "LoopGraph", "See foretoken.device.LoopGraph.")
      .def(py::init(&make_loop), py::arg("graph"), py::arg("next_drafts"), py::arg("slots"),
           py::arg("record"), py::arg("history"), py::arg("most_rounds"), py::arg("progress"))
      .def("launch", &launch, py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
           "On a stream, given by its handle.")
      .def("cancel", &dispatch::LoopGraph::cancel, "End after the round that runs.")
      .def_property_readonly("nodes", &dispatch::LoopGraph::nodes, "Of the round.");
}

}  // namespace foretoken

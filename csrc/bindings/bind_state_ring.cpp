// The pointers of cache.StateRing.
#include <pybind11/pybind11.h>

#include "bindings/boundary.hpp"
#include "dispatch.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::Intake;
using boundary::kIndexDTypes;

constexpr auto kAny = boundary::Layout::any;

void read_ring(Intake& intake, StateRingArgs& args, py::handle current, py::handle reserved,
               int64_t entries) {
  if (entries < 2 || entries > kMostRingEntries) {
    throw py::value_error("entries: expected 2 to " + std::to_string(kMostRingEntries) + ", got " +
                          std::to_string(entries));
  }
  int64_t slots = 0;
  args.current = intake.write(current, "current", DType::int32, {Dim::bind(slots, "S", 1)}, kAny);
  args.reserved = intake.write(reserved, "reserved", DType::int32, {slots}, kAny);
  args.entries = entries;
}

void read_rows(Intake& intake, StateRingArgs& args, py::handle slots, py::handle status, int64_t batch) {
  args.slots = intake.read_or_null(slots, "slots", kIndexDTypes, {batch}, kAny);
  args.status = intake.write(status, "status", DType::int32, {batch}, kAny);
  if (!args.slots && args.current.shape[0] < batch) {
    throw py::value_error("slots: needed for " + std::to_string(batch) + " rows of a ring of " +
                          std::to_string(args.current.shape[0]) + " slots, got None");
  }
}

void reserve_states(py::handle current, py::handle reserved, int64_t entries, py::handle slots,
                    py::handle parents, py::handle num_nodes, py::handle read, py::handle write,
                    py::handle status) {
  Intake intake("reserve");
  StateRingArgs args;
  read_ring(intake, args, current, reserved, entries);
  int64_t batch = 0, columns = 0;
  args.write = intake.write(write, "write", kIndexDTypes,
                            {Dim::bind(batch, "B"), Dim::bind(columns, "N + 1", 1)}, kAny);
  args.read = intake.write(read, "read", kIndexDTypes, {batch, columns}, kAny);
  if (columns >= entries) {
    throw py::value_error("write: expected at most " + std::to_string(entries - 1) +
                          " nodes, as the ring has " + std::to_string(entries) + " entries, got " +
                          std::to_string(columns));
  }
  args.parents = intake.read_or_null(parents, "parents", kIndexDTypes, {batch, columns - 1}, kAny);
  args.num_nodes = intake.read_or_null(num_nodes, "num_nodes", kIndexDTypes, {batch}, kAny);
  read_rows(intake, args, slots, status, batch);
  const Device device = intake.device();
  const Stream stream = intake.stream();
  py::gil_scoped_release unlocked;
  dispatch::reserve_states(args, device, stream);
}

void commit_states(py::handle current, py::handle reserved, int64_t entries, py::handle slots,
                   py::handle path, py::handle num_accepted, py::handle status) {
  Intake intake("commit");
  StateRingArgs args;
  read_ring(intake, args, current, reserved, entries);
  int64_t batch = 0, depth = 0;
  args.num_accepted = intake.read(num_accepted, "num_accepted", kIndexDTypes, {Dim::bind(batch, "B")}, kAny);
  args.path = intake.read_or_null(path, "path", kIndexDTypes, {batch, Dim::bind(depth, "D")}, kAny);
  read_rows(intake, args, slots, status, batch);
  const Device device = intake.device();
  const Stream stream = intake.stream();
  py::gil_scoped_release unlocked;
  dispatch::commit_states(args, device, stream);
}

}  // namespace

void register_state_ring(py::module_& module) {
  module.def("reserve_states", &reserve_states, py::arg("current"), py::arg("reserved"), py::arg("entries"),
             py::arg("slots"), py::arg("parents"), py::arg("num_nodes"), py::arg("read"), py::arg("write"),
             py::arg("status"), "See foretoken.cache.StateRing.reserve.");
  module.def("commit_states", &commit_states, py::arg("current"), py::arg("reserved"), py::arg("entries"),
             py::arg("slots"), py::arg("path"), py::arg("num_accepted"), py::arg("status"),
             "See foretoken.cache.StateRing.commit.");
}

}  // namespace foretoken

// ops.commit.
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

struct State {
  py::handle text, base, next_drafts, ends, limits, budgets, eos_ids, stop_ids;
};

void read_state(Intake& intake, const State& state, CommitArgs& args) {
  int64_t slots = 0, length = 0, eos = 0, stops = 0;
  args.text = intake.write(state.text, "state.text", DType::int32,
                           {Dim::bind(slots, "S", 1), Dim::bind(length, "L", 1)}, kAny);
  args.base = intake.write(state.base, "state.base", DType::int64, {slots}, kAny);
  args.next_drafts = intake.write(state.next_drafts, "state.next_drafts", DType::int32, {slots}, kAny);
  args.ends = intake.write(state.ends, "state.ends", DType::int32, {slots}, kAny);
  args.limits = intake.read(state.limits, "state.limits", DType::int64, {slots}, kAny);
  args.budgets = intake.read(state.budgets, "state.budgets", DType::int32, {slots}, kAny);
  args.eos_ids =
      intake.read(state.eos_ids, "state.eos_ids", DType::int32, {slots, Dim::bind(eos, "n")}, kAny);
  args.stop_ids =
      intake.read(state.stop_ids, "state.stop_ids", DType::int32, {slots, Dim::bind(stops, "m")}, kAny);
}

void read_counters(Intake& intake, py::handle sums, py::handle by_position, py::handle by_drafts,
                   CommitArgs& args) {
  const int64_t slots = args.base.shape[0];
  int64_t positions = 0, drafts = 0;
  args.sums = intake.write(sums, "counters.sums", DType::int64, {slots, kCommitCounters}, kAny);
  args.by_position = intake.write(by_position, "counters.accepted_per_pos", DType::int64,
                                  {slots, Dim::bind(positions, "D")}, kAny);
  args.by_drafts = intake.write(by_drafts, "counters.rounds_by_drafts", DType::int64,
                                {slots, Dim::bind(drafts, "N + 1")}, kAny);
}

void commit(py::handle tokens, py::handle num_emitted, py::handle num_accepted, py::handle status,
            py::handle logprobs, py::handle path, py::handle num_drafts, py::handle parents, py::handle slots,
            py::handle text, py::handle base, py::handle next_drafts, py::handle ends, py::handle limits,
            py::handle budgets, py::handle eos_ids, py::handle stop_ids, py::handle record, py::handle sums,
            py::handle by_position, py::handle by_drafts, py::handle outbox_state, uintptr_t outbox,
            int64_t outbox_places, int64_t outbox_size) {
  Intake intake("commit");
  CommitArgs args;
  int64_t batch = 0, columns = 0;
  args.tokens = intake.read(tokens, "verdict.tokens", kIndexDTypes,
                            {Dim::bind(batch, "B"), Dim::bind(columns, "D + 1", 1)}, kAny);
  args.num_emitted = intake.read(num_emitted, "verdict.num_emitted", DType::int32, {batch}, kAny);
  args.num_accepted = intake.read(num_accepted, "verdict.num_accepted", DType::int32, {batch}, kAny);
  args.status = intake.read(status, "verdict.status", DType::int32, {batch}, kAny);
  args.logprobs = intake.read_or_null(logprobs, "verdict.logprobs", DType::float32, {batch, columns}, kAny);
  args.num_drafts = intake.read(num_drafts, "num_drafts", DType::int32, {batch}, kAny);
  if (!parents.is_none()) {
    int64_t depth = 0, nodes = 0;
    args.path = intake.read(path, "verdict.path", DType::int32, {batch, Dim::bind(depth, "D")}, kAny);
    args.parents = intake.read(parents, "parents", kIndexDTypes, {batch, Dim::bind(nodes, "N")}, kAny);
  }
  args.slots = intake.read_or_null(slots, "slots", DType::int32, {batch}, kAny);
  read_state(intake, {text, base, next_drafts, ends, limits, budgets, eos_ids, stop_ids}, args);
  if (!args.slots && args.base.shape[0] < batch) {
    throw py::value_error("state: expected at least " + std::to_string(batch) +
                          " slots (one per row, as slots is None), got " +
                          std::to_string(args.base.shape[0]));
  }
  args.record = intake.write_or_null(record, "record", DType::int32,
                                     {batch, record_width(columns, bool(args.logprobs))}, kAny);
  if (!sums.is_none() || !by_position.is_none() || !by_drafts.is_none()) {
    read_counters(intake, sums, by_position, by_drafts, args);
  }
  if (outbox != 0) {
    const TensorView state = intake.write(outbox_state, "outbox_state", DType::int32,
                                          {int64_t{kOutboxFields}}, boundary::Layout::contiguous);
    const int64_t size = batch * record_width(columns, bool(args.logprobs));
    if (outbox_places < 1 || (outbox_places & (outbox_places - 1)) != 0 || outbox_size < size) {
      throw py::value_error("outbox: expected a power of two of places for " + std::to_string(size) +
                            " numbers, got " + std::to_string(outbox_places) + " for " +
                            std::to_string(outbox_size));
    }
    args.outbox = reinterpret_cast<int32_t*>(outbox);
    args.outbox_places = outbox_places;
    args.outbox_size = outbox_size;
    args.outbox_state = static_cast<int32_t*>(state.data);
  }
  const Device device = intake.device();
  const Stream stream = intake.stream();
  py::gil_scoped_release unlocked;
  dispatch::commit(args, device, stream);
}

}  // namespace

void register_step_inputs(py::module_& module);

// Both ends of a round on a device.
void register_commit(py::module_& module) {
  register_step_inputs(module);
  module.def("commit", &commit, py::arg("tokens"), py::arg("num_emitted"), py::arg("num_accepted"),
             py::arg("status"), py::arg("logprobs"), py::arg("path"), py::arg("num_drafts"),
             py::arg("parents"), py::arg("slots"), py::arg("text"), py::arg("base"), py::arg("next_drafts"),
             py::arg("ends"), py::arg("limits"), py::arg("budgets"), py::arg("eos_ids"), py::arg("stop_ids"),
             py::arg("record"), py::arg("sums"), py::arg("by_position"), py::arg("by_drafts"),
             py::arg("outbox_state") = py::none(), py::arg("outbox") = 0, py::arg("outbox_places") = 0,
             py::arg("outbox_size") = 0, "See foretoken.ops.commit.");
  module.def("record_width", &record_width, py::arg("columns"), py::arg("logprobs"),
             "See foretoken.ops.record_width.");
}

}  // namespace foretoken

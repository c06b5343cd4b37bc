// Rounds that the device repeats by itself.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "bindings/boundary.hpp"
#include "dispatch.hpp"
#include "math/draft_tiers.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::Intake;

// Rounds to choose from: handles of graphs, most drafts, costs, records (all or none).
std::vector<void*> read_tiers(Intake& intake, const py::list& tiers, int64_t batch, LoopGraphArgs& args) {
  if (py::len(tiers) < 1 || py::len(tiers) > kMostTiers) {
    throw py::value_error("tiers: expected 1 to " + std::to_string(kMostTiers) + ", got " +
                          std::to_string(py::len(tiers)));
  }
  std::vector<void*> graphs;
  for (const py::handle each : tiers) {
    const auto [graph, drafts, cost, record] =
        py::cast<std::tuple<uintptr_t, int32_t, int32_t, py::object>>(each);
    if (graph == 0) throw py::value_error("graph: expected the handle of a captured graph, got 0");
    LoopTier& tier = args.tiers[graphs.size()];
    tier.drafts = drafts;
    tier.cost = cost;
    const int32_t before = graphs.empty() ? -1 : args.tiers[graphs.size() - 1].drafts;
    if (drafts <= before || cost < 1 || cost > kMostCost) {
      throw py::value_error("tiers: expected ascending drafts and costs of 1 to " +
                            std::to_string(kMostCost) + ", got " + std::to_string(drafts) + " and " +
                            std::to_string(cost));
    }
    int64_t width = 0;
    tier.record = intake.read_or_null(record, "record", DType::int32, {batch, Dim::bind(width, "W", 1)});
    if (bool(tier.record) != bool(args.tiers[0].record)) {
      throw py::value_error("record: expected one of every tier or of none");
    }
    args.width = std::max(args.width, width);
    graphs.push_back(reinterpret_cast<void*>(graph));
  }
  args.tier_count = static_cast<int32_t>(graphs.size());
  return graphs;
}

// `ring`: the address of pinned memory, 0 for none, with a place for `ring_rounds` rounds.
std::unique_ptr<dispatch::LoopGraph> make_loop(const py::list& tiers, py::handle next_drafts,
                                               py::handle slots, py::handle acceptance, py::handle history,
                                               uintptr_t ring, int64_t ring_rounds, py::handle limits,
                                               py::handle progress) {
  Intake intake("LoopGraph");
  LoopGraphArgs args;
  int64_t batch = 0, slot_count = 0, rounds = 0;
  args.next_drafts = intake.read(next_drafts, "next_drafts", DType::int32, {Dim::bind(slot_count, "S", 1)});
  args.slots = intake.read(slots, "slots", DType::int32, {Dim::bind(batch, "B", 1)});
  const std::vector<void*> graphs = read_tiers(intake, tiers, batch, args);
  const int64_t entry = kEntryFields + batch * args.width;
  args.acceptance = intake.write_or_null(acceptance, "acceptance", DType::int32, {slot_count, 2});
  args.history = intake.write_or_null(history, "history", DType::int32, {Dim::bind(rounds, "R", 1), entry},
                                      boundary::Layout::contiguous);
  args.limits = intake.read(limits, "limits", DType::int32, {kLoopLimits});
  args.progress =
      intake.write(progress, "progress", DType::int32, {kLoopFields}, boundary::Layout::contiguous);
  const bool kept = args.history || ring != 0;
  if (bool(args.tiers[0].record) != kept) {
    throw py::value_error("history: expected one, or a ring, beside records, and none without");
  }
  if (graphs.size() > 1 && !(args.acceptance && kept)) {
    throw py::value_error("acceptance: expected one, and records, beside several tiers");
  }
  if (ring != 0 && (ring_rounds < 1 || (ring_rounds & (ring_rounds - 1)) != 0)) {
    throw py::value_error("ring_rounds: expected a power of two, got " + std::to_string(ring_rounds));
  }
  args.ring = reinterpret_cast<int32_t*>(ring);
  args.ring_rounds = ring_rounds;
  const Device device = intake.device();
  py::gil_scoped_release unlocked;
  return std::make_unique<dispatch::LoopGraph>(args, graphs, device);
}

// What a device has written to a ring is read after the count that announces it.
int32_t ring_written(uintptr_t ring) {
  return __atomic_load_n(reinterpret_cast<const int32_t*>(ring) + kRingWritten, __ATOMIC_ACQUIRE);
}

// The places of entries that have been read may be written again.
void set_ring_read(uintptr_t ring, int32_t count) {
  __atomic_store_n(reinterpret_cast<int32_t*>(ring) + kRingRead, count, __ATOMIC_RELEASE);
}

void launch(dispatch::LoopGraph& loop, uintptr_t stream) {
  loop.launch(Stream{reinterpret_cast<void*>(stream)});
}

}  // namespace

void register_loop_graph(py::module_& module) {
  py::class_<dispatch::LoopGraph>(module, "LoopGraph", "See foretoken.device.LoopGraph.")
      .def(py::init(&make_loop), py::arg("tiers"), py::arg("next_drafts"), py::arg("slots"),
           py::arg("acceptance"), py::arg("history"), py::arg("ring"), py::arg("ring_rounds"),
           py::arg("limits"), py::arg("progress"))
      .def("launch", &launch, py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
           "On a stream, given by its handle.")
      .def("cancel", &dispatch::LoopGraph::cancel, "End after the round that runs.")
      .def("is_done", &dispatch::LoopGraph::is_done, "Whether the last launch has ended; waits for nothing.")
      .def_property_readonly("nodes", &dispatch::LoopGraph::nodes, "Of the rounds.");
  module.def("loop_takes_tiers", &dispatch::LoopGraph::takes_tiers,
             "Whether build and driver let the device choose among rounds.");
  module.def(
      "ring_layout", [] { return std::make_pair(int{kRingFields}, int{kEntryFields}); },
      "Numbers in front of a ring, and of each of its entries.");
  module.def("ring_written", &ring_written, py::arg("ring"));
  module.def("set_ring_read", &set_ring_read, py::arg("ring"), py::arg("count"));
}

}  // namespace foretoken

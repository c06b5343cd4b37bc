// ops.tile_stats.
#include <pybind11/pybind11.h>

#include "bindings/boundary.hpp"
#include "bindings/op_checks.hpp"
#include "bindings/sampling_table.hpp"
#include "dispatch.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::Intake;
using boundary::Layout;

void tile_stats(py::handle logits, const SamplingTable& sampling, py::handle slots, py::handle out) {
  Intake intake("tile_stats");
  TileStatsArgs args;
  int64_t batch = 0, nodes = 0, vocab = 0;
  const bool by_node = intake.rank_of(logits, "logits") == 3;
  const Dim rows = Dim::bind(batch, "B"), columns = Dim::bind(vocab, "V", 1);
  args.logits =
      by_node ? intake.read(logits, "logits", boundary::kRealDTypes, {rows, Dim::bind(nodes, "T"), columns})
              : intake.read(logits, "logits", boundary::kRealDTypes, {rows, columns});
  check_vocab("logits", vocab);
  args.slots = intake.read_or_null(slots, "slots", DType::int32, {batch}, Layout::any);
  check_table("sampling", sampling, slots, batch);
  const int64_t tiles = tiles_of(vocab);
  args.out = by_node ? intake.write(out, "out", DType::float32, {batch, nodes, tiles, 2}, Layout::contiguous)
                     : intake.write(out, "out", DType::float32, {batch, tiles, 2}, Layout::contiguous);
  const Device device = intake.device();
  const Stream stream = intake.stream();
  args.sampling = sampling.view(device, stream);
  py::gil_scoped_release unlocked;
  dispatch::tile_stats(args, device, stream);
}

}  // namespace

void register_tile_stats(py::module_& module) {
  module.attr("TILE") = kTile;
  module.def("tile_stats", &tile_stats, py::arg("logits"), py::arg("sampling"), py::arg("slots"),
             py::arg("out"), "See foretoken.ops.tile_stats.");
}

}  // namespace foretoken

// The sampling law of requests, and ops.sample.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/boundary.hpp"
#include "bindings/op_checks.hpp"
#include "bindings/sampling_table.hpp"
#include "dispatch.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::Intake;
using boundary::kIndexDTypes;
using boundary::kRealDTypes;
using boundary::Layout;

constexpr int64_t kMaxStep = (1 << 24) - 1;

// Bytes of device scratch that are missing: then nothing was done. 0: done.
int64_t sample(py::handle logits, const SamplingTable& sampling, py::handle base, py::handle slots,
               py::handle bitmask, py::handle history, py::handle prompt_lengths, py::handle path,
               py::handle vocab_map, int64_t vocab_size, Purpose purpose, SampleMethod method, int64_t step,
               py::handle tokens, py::handle logprobs, py::handle status, py::handle records,
               py::handle workspace) {
  Intake intake("sample");
  SampleArgs args;
  int64_t batch = 0, vocab = 0, drafted = 0;
  args.logits = intake.read(logits, "logits", kRealDTypes, {Dim::bind(batch, "B"), Dim::bind(vocab, "V", 1)});
  check_vocab("logits", vocab);
  args.base = intake.read(base, "base", DType::int64, {batch}, Layout::any);
  args.slots = intake.read_or_null(slots, "slots", DType::int32, {batch}, Layout::any);
  check_table("sampling", sampling, slots, batch);
  args.bitmask =
      intake.read_or_null(bitmask, "bitmask", DType::int32, {batch, (vocab + 31) / 32}, Layout::any);
  if (args.bitmask && !vocab_map.is_none()) {
    throw py::value_error(
        "bitmask: expected None beside vocab_map (a grammar speaks of target ids), got both");
  }
  read_history(intake, history, prompt_lengths, sampling.needs_history(), sampling.size(), args.history);
  args.path = intake.read_or_null(path, "path", kIndexDTypes, {batch, Dim::bind(drafted, "P")}, Layout::any);
  args.vocab_map = intake.read_or_null(vocab_map, "vocab_map", DType::int32, {vocab}, Layout::any);
  args.emitted_vocab = args.vocab_map ? vocab_size : vocab;
  if (args.vocab_map) check_vocab("vocab_size", vocab_size);
  args.tokens = intake.write(tokens, "out", DType::int64, {batch}, Layout::any);
  args.logprobs = intake.write_or_null(logprobs, "logprobs", DType::float32, {batch}, Layout::any);
  args.status = intake.write_or_null(status, "status", DType::int32, {batch}, Layout::any);
  args.records = intake.write_or_null(records, "records", DType::int64, {batch, kRecordWords}, Layout::any);
  args.purpose = purpose;
  args.method = method;
  // What the counter has room for; a step beyond it would be another purpose's number.
  if (step < 0 || step > kMaxStep) {
    throw py::value_error("step: expected 0 to " + std::to_string(kMaxStep) + ", got " +
                          std::to_string(step));
  }
  args.step = static_cast<int32_t>(step);
  args.constrained = sampling.constrained();
  int64_t room = 0;
  const TensorView scratch =
      intake.write_or_null(workspace, "workspace", DType::uint8, {Dim::bind(room, "bytes")});
  const Device device = intake.device();
  const int64_t needed = dispatch::sample_workspace(args, device);
  if (needed > room) return needed;
  const Stream stream = intake.stream();
  args.sampling = sampling.view(device, stream);
  py::gil_scoped_release unlocked;
  dispatch::sample(args, scratch.data, device, stream);
  return 0;
}

void bring_to(const SamplingTable& table, py::handle tensor) {
  Intake intake("bring_to");
  int64_t size = 0;
  intake.read(tensor, "tensor", boundary::kIndexDTypes, {boundary::Dim::bind(size)}, boundary::Layout::any);
  table.view(intake.device(), intake.stream());
}

void bind_table(py::module_& module) {
  py::class_<SamplingTable>(
      module, "SamplingTable",
      "Sampling law of a number of request slots. Slots start at temperature 1, no filters, seed 0.")
      .def(py::init<int64_t>(), py::arg("size"))
      .def_property_readonly("size", &SamplingTable::size)
      .def_property_readonly(
          "needs_history", &SamplingTable::needs_history,
          "Whether a slot asks what has been committed: penalties, bad words, minimum length.")
      .def_property_readonly("constrained", &SamplingTable::constrained,
                             "Whether a slot changes its logits: bias, penalties, bans.")
      .def_property_readonly("weighs_rows", &SamplingTable::weighs_rows,
                             "Whether any slot has top-p without top-k: CUDA has other kernels for all rows.")
      .def("bring_to", &bring_to, py::arg("tensor"),
           "Write what has changed to the device of a tensor, as the next op there would: for captured "
           "graphs.")
      .def("set", &SamplingTable::set, py::arg("slot"), py::arg("temperature"), py::arg("top_k"),
           py::arg("top_p"), py::arg("min_p"), py::arg("seed"),
           "Write one slot, without constraints; raises ValueError or IndexError naming the argument.")
      .def(
          "constrain",
          [](SamplingTable& table, int64_t slot, double repetition_penalty, double frequency_penalty,
             double presence_penalty, std::vector<int64_t> bias_ids, std::vector<double> bias,
             std::vector<std::vector<int64_t>> bad_words, int64_t min_new_tokens,
             std::vector<int64_t> stop_ids) {
            if (bias_ids.size() != bias.size()) {
              throw py::value_error("bias: expected one number an id, got " + std::to_string(bias.size()));
            }
            table.constrain(
                slot, {repetition_penalty, frequency_penalty, presence_penalty, min_new_tokens,
                       std::move(stop_ids), std::move(bias_ids), std::move(bias), std::move(bad_words)});
          },
          py::arg("slot"), py::arg("repetition_penalty"), py::arg("frequency_penalty"),
          py::arg("presence_penalty"), py::arg("bias_ids"), py::arg("bias"), py::arg("bad_words"),
          py::arg("min_new_tokens"), py::arg("stop_ids"), "Penalties, bias and bans of one slot.")
      .def("copy", &SamplingTable::copy, py::arg("slot"), py::arg("source"), py::arg("source_slot"),
           "Write into one slot what a slot of a table holds, constraints included.")
      .def(
          "get",
          [](const SamplingTable& table, int64_t slot) {
            if (slot < 0 || slot >= table.size()) throw py::index_error("slot: outside the table");
            const SamplingView view = table.view();
            return py::make_tuple(view.temperature[slot], view.top_k[slot], view.top_p[slot],
                                  view.min_p[slot], view.seed[slot]);
          },
          py::arg("slot"), "(temperature, top_k, top_p, min_p, seed) of one slot.");
}

}  // namespace

void register_sampling(py::module_& module) {
  py::enum_<Purpose>(module, "Purpose", "What a random number is drawn for; purposes never share one.")
      .value("draft", Purpose::draft)
      .value("accept", Purpose::accept)
      .value("close", Purpose::close)
      .value("plain", Purpose::plain)
      .value("gumbel", Purpose::gumbel);
  py::enum_<SampleMethod>(module, "SampleMethod", "How a token is drawn from its law.")
      .value("inverse", SampleMethod::inverse)
      .value("gumbel", SampleMethod::gumbel);
  bind_table(module);
  module.def(
      "derive_seed",
      [](uint64_t seed, uint32_t row, uint32_t sequence) { return derive_seed(seed, row, sequence); },
      py::arg("seed"), py::arg("row"), py::arg("sequence"),
      "Seed of a row and return sequence under one integer seed; (0, 0) is the seed itself.");
  module.def(
      "sizes",
      [](py::handle tensor, const char* name, int rank) -> py::typing::Tuple<py::int_, py::ellipsis> {
        return py::tuple(py::cast(Intake("sizes").sizes_of(tensor, name, rank)));
      },
      py::arg("tensor"), py::arg("name"), py::arg("rank"),
      "Sizes of a tensor of `rank` dimensions; refuses anything else, naming the argument.");
  module.def("sample", &sample, py::arg("logits"), py::arg("sampling"), py::arg("base"), py::arg("slots"),
             py::arg("bitmask"), py::arg("history"), py::arg("prompt_lengths"), py::arg("path"),
             py::arg("vocab_map"), py::arg("vocab_size"), py::arg("purpose"), py::arg("method"),
             py::arg("step"), py::arg("out"), py::arg("logprobs"), py::arg("status"), py::arg("records"),
             py::arg("workspace"),
             "See foretoken.ops.sample. Returns the bytes of workspace that are missing; 0: done.");
}

}  // namespace foretoken

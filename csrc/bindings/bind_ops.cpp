#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include "bindings/boundary.hpp"
#include "bindings/sampling_table.hpp"
#include "dispatch.hpp"
#include "math/chain_walk.hpp"
#include "math/row_law.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::Intake;
using boundary::kIndexDTypes;
using boundary::kRealDTypes;

void check_vocab(const char* name, int64_t vocab) {
  if (vocab > kMaxVocab) {
    throw py::value_error(std::string(name) + ": expected at most " + std::to_string(kMaxVocab) +
                          " tokens in the vocabulary, got " + std::to_string(vocab));
  }
}

void check_table(const char* name, const SamplingTable& table, py::handle slots, int64_t batch) {
  if (slots.is_none() && table.size() < batch) {
    throw py::value_error(std::string(name) + ": expected at least " + std::to_string(batch) +
                          " slots (one per row, as slots is None), got " + std::to_string(table.size()));
  }
}

void sample(py::handle logits, const SamplingTable& sampling, py::handle base, py::handle slots,
            Purpose purpose, int32_t step, py::handle tokens, py::handle logprobs, py::handle status) {
  Intake intake("sample");
  SampleArgs args;
  int64_t batch = 0, vocab = 0;
  args.logits = intake.read(logits, "logits", kRealDTypes, {Dim::bind(batch, "B"), Dim::bind(vocab, "V", 1)});
  check_vocab("logits", vocab);
  args.base = intake.read(base, "base", DType::int64, {batch}, boundary::Layout::any);
  args.slots = intake.read_or_null(slots, "slots", DType::int32, {batch}, boundary::Layout::any);
  check_table("sampling", sampling, slots, batch);
  args.tokens = intake.write(tokens, "out", DType::int64, {batch}, boundary::Layout::any);
  args.logprobs = intake.write_or_null(logprobs, "logprobs", DType::float32, {batch}, boundary::Layout::any);
  args.status = intake.write_or_null(status, "status", DType::int32, {batch}, boundary::Layout::any);
  args.sampling = sampling.view();
  args.purpose = purpose;
  args.step = step;
  const Device device = intake.device();
  const Stream stream = intake.stream();
  py::gil_scoped_release unlocked;
  dispatch::sample(args, device, stream);
}

// The inputs of verify, in the order of its Python signature.
struct VerifyInputs {
  py::handle target_logits, row_offsets, draft_tokens, num_drafts, draft_logits, draft_probs, draft_row, base,
      slots;
};

void read_target(Intake& intake, const VerifyInputs& in, VerifyArgs& args, int64_t batch, int64_t nodes,
                 int64_t& vocab) {
  const bool flattened = intake.rank_of(in.target_logits, "target_logits") == 2;
  if (flattened == in.row_offsets.is_none()) {
    throw py::value_error(
        flattened ? "row_offsets: expected offsets [B + 1] with flattened target_logits [R, V], got None"
                  : "row_offsets: expected None with target_logits [B, T, V], got offsets");
  }
  if (!flattened) {
    args.target_logits = intake.read(in.target_logits, "target_logits", kRealDTypes,
                                     {batch, nodes + 1, Dim::bind(vocab, "V", 1)});
    return;
  }
  int64_t rows = 0;
  args.target_logits = intake.read(in.target_logits, "target_logits", kRealDTypes,
                                   {Dim::bind(rows, "R"), Dim::bind(vocab, "V", 1)});
  args.row_offsets =
      intake.read(in.row_offsets, "row_offsets", kIndexDTypes, {batch + 1}, boundary::Layout::any);
}

void read_drafts(Intake& intake, const VerifyInputs& in, VerifyArgs& args, int64_t batch, int64_t nodes,
                 int64_t vocab) {
  if (!in.draft_logits.is_none() && !in.draft_probs.is_none()) {
    throw py::value_error("draft_probs: expected None beside draft_logits, got both laws");
  }
  args.num_drafts =
      intake.read_or_null(in.num_drafts, "num_drafts", DType::int32, {batch}, boundary::Layout::any);
  const Dim law_rows = in.draft_row.is_none() ? Dim::at_least(nodes) : Dim::at_least(0);
  args.draft_logits =
      intake.read_or_null(in.draft_logits, "draft_logits", kRealDTypes, {batch, law_rows, vocab});
  args.draft_probs =
      intake.read_or_null(in.draft_probs, "draft_probs", kRealDTypes, {batch, law_rows, vocab});
  args.draft_row =
      intake.read_or_null(in.draft_row, "draft_row", DType::int32, {batch, nodes}, boundary::Layout::any);
}

void verify(py::handle target_logits, py::handle row_offsets, py::handle draft_tokens, py::handle num_drafts,
            py::handle draft_logits, py::handle draft_probs, py::handle draft_row, py::handle base,
            py::handle slots, const SamplingTable& sampling, const SamplingTable& draft_sampling, Rule rule,
            py::handle out_tokens, py::handle out_num_emitted, py::handle out_num_accepted,
            py::handle out_next_token, py::handle out_next_lengths, py::handle out_status,
            py::handle out_logprobs) {
  const VerifyInputs in{target_logits, row_offsets, draft_tokens, num_drafts, draft_logits,
                        draft_probs,   draft_row,   base,         slots};
  Intake intake("verify");
  VerifyArgs args;
  int64_t batch = 0, nodes = 0, vocab = 0;
  args.draft_tokens = intake.read(draft_tokens, "draft_tokens", kIndexDTypes,
                                  {Dim::bind(batch, "B"), Dim::bind(nodes, "N")}, boundary::Layout::any);
  if (nodes > kMaxDrafts) {
    throw py::value_error("draft_tokens: expected at most " + std::to_string(kMaxDrafts) +
                          " drafts a row, got " + std::to_string(nodes));
  }
  read_target(intake, in, args, batch, nodes, vocab);
  check_vocab("target_logits", vocab);
  read_drafts(intake, in, args, batch, nodes, vocab);
  args.base = intake.read(base, "base", DType::int64, {batch}, boundary::Layout::any);
  args.slots = intake.read_or_null(slots, "slots", DType::int32, {batch}, boundary::Layout::any);
  check_table("sampling", sampling, slots, batch);
  check_table("draft_sampling", draft_sampling, slots, batch);
  args.sampling = sampling.view();
  args.draft_sampling = draft_sampling.view();
  args.rule = rule;

  const auto any = boundary::Layout::any;
  const DType ids = args.draft_tokens.dtype;
  args.tokens = intake.write(out_tokens, "out.tokens", ids, {batch, nodes + 1}, any);
  args.num_emitted = intake.write(out_num_emitted, "out.num_emitted", DType::int32, {batch}, any);
  args.num_accepted = intake.write(out_num_accepted, "out.num_accepted", DType::int32, {batch}, any);
  args.next_token = intake.write(out_next_token, "out.next_token", ids, {batch}, any);
  args.next_lengths = intake.write(out_next_lengths, "out.next_lengths", DType::int64, {batch}, any);
  args.status = intake.write(out_status, "out.status", DType::int32, {batch}, any);
  args.logprobs = intake.write_or_null(out_logprobs, "out.logprobs", DType::float32, {batch, nodes + 1}, any);
  const Device device = intake.device();
  const Stream stream = intake.stream();
  py::gil_scoped_release unlocked;
  dispatch::verify(args, device, stream);
}

}  // namespace

void register_ops(py::module_& module) {
  py::enum_<Purpose>(module, "Purpose", "What a random number is drawn for; purposes never share one.")
      .value("draft", Purpose::draft)
      .value("accept", Purpose::accept)
      .value("close", Purpose::close)
      .value("plain", Purpose::plain);
  py::enum_<Rule>(module, "Rule", "How drafts are accepted.")
      .value("auto", Rule::automatic)
      .value("token", Rule::token)
      .value("block", Rule::block);
  py::class_<SamplingTable>(
      module, "SamplingTable",
      "Sampling law of a number of request slots. Slots start at temperature 1, no filters, seed 0.")
      .def(py::init<int64_t>(), py::arg("size"))
      .def_property_readonly("size", &SamplingTable::size)
      .def("set", &SamplingTable::set, py::arg("slot"), py::arg("temperature"), py::arg("top_k"),
           py::arg("top_p"), py::arg("min_p"), py::arg("seed"),
           "Write one slot; raises ValueError or IndexError naming the argument.")
      .def(
          "get",
          [](const SamplingTable& table, int64_t slot) {
            if (slot < 0 || slot >= table.size()) throw py::index_error("slot: outside the table");
            const SamplingView view = table.view();
            return py::make_tuple(view.temperature[slot], view.top_k[slot], view.top_p[slot],
                                  view.min_p[slot], view.seed[slot]);
          },
          py::arg("slot"), "(temperature, top_k, top_p, min_p, seed) of one slot.");
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
             py::arg("purpose"), py::arg("step"), py::arg("out"), py::arg("logprobs"), py::arg("status"),
             "See foretoken.ops.sample.");
  module.def("verify", &verify, py::arg("target_logits"), py::arg("row_offsets"), py::arg("draft_tokens"),
             py::arg("num_drafts"), py::arg("draft_logits"), py::arg("draft_probs"), py::arg("draft_row"),
             py::arg("base"), py::arg("slots"), py::arg("sampling"), py::arg("draft_sampling"),
             py::arg("rule"), py::arg("tokens"), py::arg("num_emitted"), py::arg("num_accepted"),
             py::arg("next_token"), py::arg("next_lengths"), py::arg("status"), py::arg("logprobs"),
             "See foretoken.ops.verify.");
}

}  // namespace foretoken

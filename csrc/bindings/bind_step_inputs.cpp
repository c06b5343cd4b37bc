// What the forwards of a round on a device are fed.
#include <pybind11/pybind11.h>

#include "bindings/boundary.hpp"
#include "dispatch.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::Intake;
using boundary::Layout;

template <class Element>
Element* data(const TensorView& view) {
  return static_cast<Element*>(view.data);
}

void read_draft_side(Intake& intake, py::handle reach, py::handle first_tokens, py::handle first_positions,
                     py::handle draft_lengths, py::handle draft_used, int64_t cache_rows,
                     StepInputsArgs& args) {
  const auto of_model = [&](py::handle object, const char* name, DType dtype,
                            std::initializer_list<Dim> shape) {
    return intake.write(object, name, dtype, shape, Layout::contiguous);
  };
  if (args.columns < 2) throw py::value_error("reach: expected None where nothing is drafted");
  args.reach = data<int64_t>(of_model(reach, "reach", DType::int64, {args.num_slots}));
  args.first_tokens =
      data<int64_t>(of_model(first_tokens, "first_tokens", DType::int64, {args.rows, kCatchUpColumns}));
  args.first_positions =
      data<int64_t>(of_model(first_positions, "first_positions", DType::int64, {args.rows, kCatchUpColumns}));
  args.draft_lengths =
      data<int64_t>(of_model(draft_lengths, "draft_lengths", DType::int64, {args.columns - 1, args.rows}));
  args.draft_used = data<int32_t>(of_model(draft_used, "draft_used", DType::int32, {2, args.rows}));
  args.cache_rows = cache_rows;
}

void write_step_inputs(py::handle text, py::handle base, py::handle next_drafts, py::handle seats,
                       py::handle tokens, py::handle positions, py::handle lengths, py::handle num_tokens,
                       py::handle num_drafts, py::handle row_base, py::handle slots, py::handle reach,
                       py::handle first_tokens, py::handle first_positions, py::handle draft_lengths,
                       py::handle draft_used, int64_t cache_rows) {
  Intake intake("step_inputs");
  StepInputsArgs args;
  const auto read = [&](py::handle object, const char* name, DType dtype, std::initializer_list<Dim> shape) {
    return intake.read(object, name, dtype, shape, Layout::contiguous);
  };
  const auto write = [&](py::handle object, const char* name, DType dtype, std::initializer_list<Dim> shape) {
    return intake.write(object, name, dtype, shape, Layout::contiguous);
  };
  args.text = data<int32_t>(read(text, "text", DType::int32,
                                 {Dim::bind(args.num_slots, "S", 1), Dim::bind(args.text_length, "L", 1)}));
  args.base = data<int64_t>(read(base, "base", DType::int64, {args.num_slots}));
  args.next_drafts = data<int32_t>(read(next_drafts, "next_drafts", DType::int32, {args.num_slots}));
  args.tokens = data<int64_t>(write(tokens, "tokens", DType::int64,
                                    {Dim::bind(args.rows, "B"), Dim::bind(args.columns, "K + 1", 1)}));
  args.seats = data<int32_t>(read(seats, "seats", DType::int32, {args.rows}));
  args.positions = data<int64_t>(write(positions, "positions", DType::int64, {args.rows, args.columns}));
  args.lengths = data<int64_t>(write(lengths, "lengths", DType::int64, {args.rows}));
  args.num_tokens = data<int32_t>(write(num_tokens, "num_tokens", DType::int32, {args.rows}));
  args.num_drafts = data<int32_t>(write(num_drafts, "num_drafts", DType::int32, {args.rows}));
  args.row_base = data<int64_t>(write(row_base, "row_base", DType::int64, {args.rows}));
  args.slots = data<int32_t>(write(slots, "slots", DType::int32, {args.rows}));
  if (!reach.is_none()) {
    read_draft_side(intake, reach, first_tokens, first_positions, draft_lengths, draft_used, cache_rows,
                    args);
  }
  const Device device = intake.device();
  const Stream stream = intake.stream();
  py::gil_scoped_release unlocked;
  dispatch::write_step_inputs(args, device, stream);
}

void draft_ngrams(py::handle text, py::handle row_base, py::handle slots, py::handle tokens,
                  py::handle num_drafts, py::handle num_tokens, int64_t min_ngram, int64_t max_ngram) {
  Intake intake("draft_ngrams");
  NgramDraftsArgs args;
  if (min_ngram < 1 || max_ngram < min_ngram || max_ngram > kMostNgram) {
    throw py::value_error(
        "min_ngram, max_ngram: expected 1 <= min_ngram <= max_ngram <= " + std::to_string(kMostNgram) +
        ", got " + std::to_string(min_ngram) + " and " + std::to_string(max_ngram));
  }
  args.min_ngram = min_ngram;
  args.max_ngram = max_ngram;
  args.text = data<int32_t>(intake.read(
      text, "text", DType::int32, {Dim::bind(args.num_slots, "S", 1), Dim::bind(args.text_length, "L", 1)},
      Layout::contiguous));
  args.tokens = data<int64_t>(intake.write(tokens, "tokens", DType::int64,
                                           {Dim::bind(args.rows, "B"), Dim::bind(args.columns, "K + 1", 1)},
                                           Layout::contiguous));
  args.row_base =
      data<int64_t>(intake.read(row_base, "row_base", DType::int64, {args.rows}, Layout::contiguous));
  args.slots = data<int32_t>(intake.read(slots, "slots", DType::int32, {args.rows}, Layout::contiguous));
  args.num_drafts =
      data<int32_t>(intake.write(num_drafts, "num_drafts", DType::int32, {args.rows}, Layout::contiguous));
  args.num_tokens =
      data<int32_t>(intake.write(num_tokens, "num_tokens", DType::int32, {args.rows}, Layout::contiguous));
  const Device device = intake.device();
  const Stream stream = intake.stream();
  py::gil_scoped_release unlocked;
  dispatch::draft_ngrams(args, device, stream);
}

void last_logits(py::handle logits, py::handle used, py::handle out) {
  Intake intake("last_logits");
  LastLogitsArgs args;
  int64_t rows = 0, columns = 0, vocab = 0, width = 0;
  args.logits = intake.read(logits, "logits", boundary::kRealDTypes,
                            {Dim::bind(rows, "B"), Dim::bind(columns, "T", 1), Dim::bind(vocab, "V")});
  args.used = intake.read_or_null(used, "used", DType::int32, {rows}, Layout::any);
  args.out = intake.write(out, "out", args.logits.dtype, {rows, Dim::bind(width, "W")});
  if (width > vocab) {
    throw py::value_error("out: expected at most " + std::to_string(vocab) + " logits a row, got " +
                          std::to_string(width));
  }
  const Device device = intake.device();
  const Stream stream = intake.stream();
  py::gil_scoped_release unlocked;
  dispatch::last_logits(args, device, stream);
}

}  // namespace

void register_step_inputs(py::module_& module) {
  module.def("write_step_inputs", &write_step_inputs, py::arg("text"), py::arg("base"),
             py::arg("next_drafts"), py::arg("seats"), py::arg("tokens"), py::arg("positions"),
             py::arg("lengths"), py::arg("num_tokens"), py::arg("num_drafts"), py::arg("row_base"),
             py::arg("slots"), py::arg("reach"), py::arg("first_tokens"), py::arg("first_positions"),
             py::arg("draft_lengths"), py::arg("draft_used"), py::arg("cache_rows"),
             "See foretoken.device.inputs.StepInputs.write.");
  module.def("draft_ngrams", &draft_ngrams, py::arg("text"), py::arg("row_base"), py::arg("slots"),
             py::arg("tokens"), py::arg("num_drafts"), py::arg("num_tokens"), py::arg("min_ngram"),
             py::arg("max_ngram"), "See foretoken.device.inputs.StepInputs.draft_ngrams.");
  module.def("last_logits", &last_logits, py::arg("logits"), py::arg("used"), py::arg("out"),
             "See foretoken.device.inputs.last_logits.");
}

}  // namespace foretoken

// ops.verify.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>

#include "bindings/boundary.hpp"
#include "bindings/op_checks.hpp"
#include "bindings/sampling_table.hpp"
#include "bindings/tolerance.hpp"
#include "bindings/verdict_places.hpp"
#include "dispatch.hpp"
#include "math/tree_index.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::Intake;
using boundary::kIndexDTypes;
using boundary::kRealDTypes;
using boundary::Layout;

// The tensors of a call, in the order of the native signature.
struct Inputs {
  py::handle target_logits, target_stats, row_offsets, draft_tokens, parents, num_drafts;
  py::handle draft_logits, draft_probs, topk_ids, topk_probs, draft_row, draft_records, vocab_map;
  py::handle bitmask, history, prompt_lengths, base, slots;
};

struct Outputs {
  py::handle tokens, num_emitted, num_accepted, path, path_rows, next_token, next_lengths, status;
  py::handle logprobs, top_tokens, top_logprobs, raw_logprobs, raw_top_tokens, raw_top_logprobs;
};

struct Sizes {
  int64_t batch = 0, nodes = 0, vocab = 0;
};

void read_target(Intake& intake, const Inputs& in, VerifyArgs& args, Sizes& size) {
  const bool flattened = intake.rank_of(in.target_logits, "target_logits") == 2;
  if (flattened == in.row_offsets.is_none()) {
    throw py::value_error(
        flattened ? "row_offsets: expected offsets [B + 1] with flattened target_logits [R, V], got None"
                  : "row_offsets: expected None with target_logits [B, T, V], got offsets");
  }
  const Dim vocab = Dim::bind(size.vocab, "V", 1);
  if (!flattened) {
    args.target_logits =
        intake.read(in.target_logits, "target_logits", kRealDTypes, {size.batch, size.nodes + 1, vocab});
    check_vocab("target_logits", size.vocab);
    args.target_stats =
        intake.read_or_null(in.target_stats, "target_stats", DType::float32,
                            {size.batch, size.nodes + 1, tiles_of(size.vocab), 2}, Layout::contiguous);
    args.bitmask = intake.read_or_null(in.bitmask, "bitmask", DType::int32,
                                       {size.batch, size.nodes + 1, (size.vocab + 31) / 32}, Layout::any);
    return;
  }
  int64_t rows = 0;
  args.target_logits =
      intake.read(in.target_logits, "target_logits", kRealDTypes, {Dim::bind(rows, "R"), vocab});
  check_vocab("target_logits", size.vocab);
  args.target_stats = intake.read_or_null(in.target_stats, "target_stats", DType::float32,
                                          {rows, tiles_of(size.vocab), 2}, Layout::contiguous);
  args.row_offsets = intake.read(in.row_offsets, "row_offsets", kIndexDTypes, {size.batch + 1}, Layout::any);
  args.bitmask =
      intake.read_or_null(in.bitmask, "bitmask", DType::int32, {rows, (size.vocab + 31) / 32}, Layout::any);
}

void refuse_second_law(const Inputs& in) {
  if (in.topk_ids.is_none() != in.topk_probs.is_none()) {
    throw py::value_error("draft_topk: expected ids and probabilities, got None for one of them");
  }
  const int laws = (in.draft_logits.is_none() ? 0 : 1) + (in.draft_probs.is_none() ? 0 : 1) +
                   (in.topk_ids.is_none() ? 0 : 1);
  if (laws > 1) {
    throw py::value_error("draft law: expected one of draft_logits, draft_probs and draft_topk, got " +
                          std::to_string(laws) + " of them");
  }
  if (!in.draft_records.is_none() && in.draft_logits.is_none()) {
    throw py::value_error("draft_records: expected beside draft_logits, whose laws they are, got them alone");
  }
}

void read_laws(Intake& intake, const Inputs& in, VerifyArgs& args, const Sizes& size) {
  refuse_second_law(in);
  int64_t law_rows = 0, width = 0;
  const Dim rows = Dim::bind(law_rows, "M", in.draft_row.is_none() ? size.nodes : 0);
  const Dim columns = Dim::bind(width, "Vd", 1);
  args.draft_logits =
      intake.read_or_null(in.draft_logits, "draft_logits", kRealDTypes, {size.batch, rows, columns});
  args.draft_probs =
      intake.read_or_null(in.draft_probs, "draft_probs", kRealDTypes, {size.batch, rows, columns});
  args.topk_ids = intake.read_or_null(in.topk_ids, "draft_topk ids", kIndexDTypes,
                                      {size.batch, rows, columns}, Layout::any);
  args.topk_probs = intake.read_or_null(in.topk_probs, "draft_topk probs", DType::float32,
                                        {size.batch, law_rows, width}, Layout::any);
  if (args.draft_logits || args.draft_probs) check_vocab("draft law", width);
  args.draft_records = intake.read_or_null(in.draft_records, "draft_records", DType::int64,
                                           {size.batch, law_rows, kRecordWords}, Layout::any);
  int64_t mapped = 0;
  const Dim map_size = args.draft_logits || args.draft_probs ? Dim::is(width) : Dim::bind(mapped, "Vd");
  args.vocab_map = intake.read_or_null(in.vocab_map, "vocab_map", DType::int32, {map_size}, Layout::any);
  args.draft_row =
      intake.read_or_null(in.draft_row, "draft_row", DType::int32, {size.batch, size.nodes + 1}, Layout::any);
}

void write_logprobs(Intake& intake, const Outputs& out, VerifyArgs& args, int64_t batch, int64_t columns) {
  const auto write = [&](VerifyArgs::Logprobs& to, py::handle chosen, py::handle tokens, py::handle top,
                         const char* chosen_name, const char* tokens_name, const char* top_name) {
    int64_t n = 0;
    to.chosen = intake.write_or_null(chosen, chosen_name, DType::float32, {batch, columns}, Layout::any);
    to.top_tokens = intake.write_or_null(tokens, tokens_name, args.draft_tokens.dtype,
                                         {batch, columns, Dim::bind(n, "n")}, Layout::any);
    if (tokens.is_none() != top.is_none()) {
      throw py::value_error(std::string(top_name) + ": expected with " + tokens_name +
                            ", and only with it, got None for one of them");
    }
    to.top = intake.write_or_null(top, top_name, DType::float32, {batch, columns, n}, Layout::any);
  };
  write(args.processed, out.logprobs, out.top_tokens, out.top_logprobs, "out.logprobs", "out.top_tokens",
        "out.top_logprobs");
  write(args.raw, out.raw_logprobs, out.raw_top_tokens, out.raw_top_logprobs, "out.raw_logprobs",
        "out.raw_top_tokens", "out.raw_top_logprobs");
}

void write_outputs(Intake& intake, const Outputs& out, VerifyArgs& args, const Sizes& size) {
  const DType ids = args.draft_tokens.dtype;
  int64_t columns = 0;
  // A chain may be accepted whole; of a tree the caller says how deep paths may be.
  const Dim depth = args.parents ? Dim::bind(columns, "D + 1", 1) : Dim::is(size.nodes + 1);
  args.tokens = intake.write(out.tokens, "out.tokens", ids, {size.batch, depth}, Layout::any);
  columns = args.tokens.shape[1];
  args.num_emitted =
      intake.write(out.num_emitted, "out.num_emitted", DType::int32, {size.batch}, Layout::any);
  args.num_accepted =
      intake.write(out.num_accepted, "out.num_accepted", DType::int32, {size.batch}, Layout::any);
  args.path =
      intake.write_or_null(out.path, "out.path", DType::int32, {size.batch, columns - 1}, Layout::any);
  args.path_rows =
      intake.write_or_null(out.path_rows, "out.path_rows", DType::int64, {size.batch, columns}, Layout::any);
  args.next_token = intake.write(out.next_token, "out.next_token", ids, {size.batch}, Layout::any);
  args.next_lengths =
      intake.write(out.next_lengths, "out.next_lengths", DType::int64, {size.batch}, Layout::any);
  args.status = intake.write(out.status, "out.status", DType::int32, {size.batch}, Layout::any);
  write_logprobs(intake, out, args, size.batch, columns);
}

// The outputs of a call without buffers, one behind the other in memory that Python has made for them.
void write_packed(Intake& intake, py::handle packed, VerifyArgs& args, const Sizes& size) {
  const DType ids = args.draft_tokens.dtype;
  const VerdictPlaces places(size.batch, size.nodes, bytes_of(ids));
  const TensorView whole =
      intake.write(packed, "packed", ids, {places.bytes / bytes_of(ids)}, Layout::contiguous);
  const auto part = [&](int64_t place, DType dtype, int64_t columns) {
    TensorView view;
    view.data = static_cast<char*>(whole.data) + place;
    view.dtype = dtype;
    view.device = whole.device;
    view.rank = columns < 0 ? 1 : 2;
    view.shape[0] = size.batch;
    view.shape[1] = columns;
    view.strides[0] = columns < 0 ? 1 : std::max<int64_t>(columns, 1);
    view.strides[1] = 1;
    return view;
  };
  constexpr int64_t kOneEach = -1;
  args.tokens = part(places.tokens, ids, size.nodes + 1);
  args.num_emitted = part(places.num_emitted, DType::int32, kOneEach);
  args.num_accepted = part(places.num_accepted, DType::int32, kOneEach);
  args.path = part(places.path, DType::int32, size.nodes);
  args.next_token = part(places.next_token, ids, kOneEach);
  args.next_lengths = part(places.next_lengths, DType::int64, kOneEach);
  args.status = part(places.status, DType::int32, kOneEach);
}

// What calls before this one have left, by device, stream and number of rows; nothing inside a captured
// graph, which outlives what it is captured among.
py::object find_kept(py::handle kept, Device device, Stream stream, int64_t batch) {
  if (kept.is_none() || dispatch::is_capturing(device, stream)) return py::none();
  const py::tuple key = py::make_tuple(device.index, reinterpret_cast<uintptr_t>(stream.handle), batch);
  PyObject* found = PyDict_GetItemWithError(kept.ptr(), key.ptr());  // borrowed
  if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return found != nullptr ? py::reinterpret_borrow<py::object>(found) : py::none();
}

void check_stats(const VerifyArgs& args) {
  if (!args.target_stats || (!args.bitmask && !args.target_constrained)) return;
  throw py::value_error(std::string("target_stats: expected None beside ") +
                        (args.bitmask ? "bitmask" : "penalties, bias or bans") +
                        ", which change the rows that they are of, got both");
}

void check_rule(const VerifyArgs& args) {
  if (args.rules) return;
  if (args.rule == Rule::gbv && args.draw != Draw::iid_paths) {
    throw py::value_error("rule: gbv expects draw iid_paths, got another draw");
  }
  if (args.rule == Rule::spectr && args.draw == Draw::without_replacement) {
    throw py::value_error("rule: spectr expects siblings drawn iid, got draw without_replacement");
  }
}

// Bytes of device scratch that are missing: then nothing was done, and the call is to be made again with a
// workspace of that size, all zero. 0: done.
int64_t verify(py::handle target_logits, py::handle target_stats, py::handle row_offsets,
               py::handle draft_tokens, py::handle parents, py::handle num_drafts, py::handle draft_logits,
               py::handle draft_probs, py::handle topk_ids, py::handle topk_probs, py::handle draft_row,
               py::handle draft_records, py::handle vocab_map, py::handle bitmask, py::handle history,
               py::handle prompt_lengths, py::handle base, py::handle slots, const SamplingTable& sampling,
               const SamplingTable& draft_sampling, Rule rule, py::handle rules, Draw draw, int32_t num_paths,
               const ToleranceValues& tolerance, py::handle tokens, py::handle num_emitted,
               py::handle num_accepted, py::handle path, py::handle path_rows, py::handle next_token,
               py::handle next_lengths, py::handle status, py::handle logprobs, py::handle top_tokens,
               py::handle top_logprobs, py::handle raw_logprobs, py::handle raw_top_tokens,
               py::handle raw_top_logprobs, py::handle workspace, py::handle packed, py::handle kept) {
  const Inputs in{target_logits, target_stats, row_offsets, draft_tokens,   parents,   num_drafts,
                  draft_logits,  draft_probs,  topk_ids,    topk_probs,     draft_row, draft_records,
                  vocab_map,     bitmask,      history,     prompt_lengths, base,      slots};
  const Outputs out{tokens,         num_emitted,     num_accepted, path,       path_rows,    next_token,
                    next_lengths,   status,          logprobs,     top_tokens, top_logprobs, raw_logprobs,
                    raw_top_tokens, raw_top_logprobs};
  Intake intake("verify");
  VerifyArgs args;
  Sizes size;
  args.draft_tokens = intake.read(in.draft_tokens, "draft_tokens", kIndexDTypes,
                                  {Dim::bind(size.batch, "B"), Dim::bind(size.nodes, "N")}, Layout::any);
  if (size.nodes > kMaxDrafts) {
    throw py::value_error("draft_tokens: expected at most " + std::to_string(kMaxDrafts) +
                          " drafts a row, got " + std::to_string(size.nodes));
  }
  args.parents =
      intake.read_or_null(in.parents, "parents", kIndexDTypes, {size.batch, size.nodes}, Layout::any);
  args.num_drafts = intake.read_or_null(in.num_drafts, "num_drafts", DType::int32, {size.batch}, Layout::any);
  read_target(intake, in, args, size);
  read_laws(intake, in, args, size);
  args.base = intake.read(in.base, "base", DType::int64, {size.batch}, Layout::any);
  args.slots = intake.read_or_null(in.slots, "slots", DType::int32, {size.batch}, Layout::any);
  check_table("sampling", sampling, in.slots, size.batch);
  check_table("draft_sampling", draft_sampling, in.slots, size.batch);
  args.target_constrained = sampling.constrained();
  args.draft_constrained = draft_sampling.constrained();
  const bool needs_history = sampling.needs_history() || draft_sampling.needs_history();
  read_history(intake, in.history, in.prompt_lengths, needs_history, sampling.size(), args.history);
  args.rules = intake.read_or_null(rules, "rule", DType::uint8,
                                   {Dim::at_least(in.slots.is_none() ? size.batch : 0)}, Layout::any);
  args.rule = rule;
  args.draw = draw;
  args.num_paths = num_paths;
  args.tolerance = tolerance.view();
  check_rule(args);
  check_stats(args);
  if (packed.is_none()) {
    write_outputs(intake, out, args, size);
  } else {
    write_packed(intake, packed, args, size);
  }
  const Device device = intake.device();
  const Stream stream = intake.stream();
  const int64_t needed = dispatch::verify_workspace(args, device);
  py::object found;  // held for as long as the call: another thread may make room in `kept`
  if (needed > 0 && workspace.is_none()) workspace = found = find_kept(kept, device, stream, size.batch);
  int64_t room = 0;
  const TensorView scratch =
      intake.write_or_null(workspace, "out.workspace", DType::uint8, {Dim::bind(room, "bytes")});
  if (needed > room) return needed;
  args.sampling = sampling.view(device, stream);
  args.draft_sampling = draft_sampling.view(device, stream);
  py::gil_scoped_release unlocked;
  dispatch::verify(args, scratch.data, device, stream);
  return 0;
}

void bind_enums(py::module_& module) {
  py::enum_<Rule>(module, "Rule", "How drafts are accepted.")
      .value("auto", Rule::automatic)
      .value("rrs", Rule::rrs)
      .value("traversal", Rule::traversal)
      .value("target_only", Rule::target_only)
      .value("spectr", Rule::spectr)
      .value("gbv", Rule::gbv)
      .value("coupled", Rule::coupled)
      .value("lossy_typical", Rule::lossy_typical)
      .value("lossy_threshold", Rule::lossy_threshold)
      .value("lossy_relaxed", Rule::lossy_relaxed)
      .value("lossy_entropy_window", Rule::lossy_entropy_window)
      .value("lossy_synthetic", Rule::lossy_synthetic);
  py::enum_<Draw>(module, "Draw", "How siblings came about.")
      .value("deterministic", Draw::deterministic)
      .value("iid", Draw::iid)
      .value("without_replacement", Draw::without_replacement)
      .value("iid_paths", Draw::iid_paths);
}

}  // namespace

void register_verify(py::module_& module) {
  bind_enums(module);
  py::class_<ToleranceValues>(module, "Tolerance", "How far the lossy rules may go.")
      .def(py::init(&make_tolerance), py::arg("typical_epsilon"), py::arg("typical_delta"),
           py::arg("threshold_single"), py::arg("threshold_sum"), py::arg("relaxed_top_k"),
           py::arg("relaxed_delta"), py::arg("window_entropy"), py::arg("window_delta"), py::arg("rates"));
  module.def(
      "verify", &verify, py::arg("target_logits"), py::arg("target_stats"), py::arg("row_offsets"),
      py::arg("draft_tokens"), py::arg("parents"), py::arg("num_drafts"), py::arg("draft_logits"),
      py::arg("draft_probs"), py::arg("topk_ids"), py::arg("topk_probs"), py::arg("draft_row"),
      py::arg("draft_records"), py::arg("vocab_map"), py::arg("bitmask"), py::arg("history"),
      py::arg("prompt_lengths"), py::arg("base"), py::arg("slots"), py::arg("sampling"),
      py::arg("draft_sampling"), py::arg("rule"), py::arg("rules"), py::arg("draw"), py::arg("num_paths"),
      py::arg("tolerance"), py::arg("tokens"), py::arg("num_emitted"), py::arg("num_accepted"),
      py::arg("path"), py::arg("path_rows"), py::arg("next_token"), py::arg("next_lengths"),
      py::arg("status"), py::arg("logprobs"), py::arg("top_tokens"), py::arg("top_logprobs"),
      py::arg("raw_logprobs"), py::arg("raw_top_tokens"), py::arg("raw_top_logprobs"), py::arg("workspace"),
      py::arg("packed") = py::none(), py::arg("kept") = py::none(),
      "See foretoken.ops.verify. `packed`: a buffer of packed_verdict() in place of single ones; `kept`: "
      "workspaces by (device, stream, rows), where none is given. Returns the bytes of workspace that are "
      "missing; 0: done.");
  module.def(
      "packed_verdict",
      [](py::handle draft_tokens) {
        Intake intake("verify");
        int64_t batch = 0, nodes = 0;
        const TensorView drafts = intake.read(draft_tokens, "draft_tokens", kIndexDTypes,
                                              {Dim::bind(batch, "B"), Dim::bind(nodes, "N")}, Layout::any);
        const int64_t bytes = bytes_of(drafts.dtype);
        return py::make_tuple(batch, nodes, VerdictPlaces(batch, nodes, bytes).bytes / bytes);
      },
      py::arg("draft_tokens"), "(B, N, elements of drafts' dtype that hold a verdict of chains).");
}

}  // namespace foretoken

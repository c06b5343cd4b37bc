// Hooks for the proofs of row preparation: the rows it makes, and those the CPU makes one by one. Tensors
// come by name, as the structs of csrc/ops call them. No part of the public interface.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/boundary.hpp"
#include "bindings/sampling_table.hpp"
#include "cpu/draft_laws.hpp"
#include "dispatch.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::DTypes;
using boundary::Intake;
using boundary::kIndexDTypes;
using boundary::kRealDTypes;
using boundary::Layout;

class Named {
 public:
  Named(Intake& intake, const py::dict& tensors) : intake_(intake), tensors_(tensors) {}

  TensorView read(const char* name, DTypes dtypes, Layout layout = Layout::any) {
    if (!tensors_.contains(name)) return {};
    const py::object tensor = tensors_[name];
    int64_t n[3];
    switch (intake_.rank_of(tensor, name)) {
      case 1: return intake_.read(tensor, name, dtypes, {Dim::bind(n[0])}, layout);
      case 2: return intake_.read(tensor, name, dtypes, {Dim::bind(n[0]), Dim::bind(n[1])}, layout);
      default:
        return intake_.read(tensor, name, dtypes, {Dim::bind(n[0]), Dim::bind(n[1]), Dim::bind(n[2])},
                            layout);
    }
  }

 private:
  Intake& intake_;
  const py::dict& tensors_;
};

VerifyArgs verify_args(Named named, Rule rule, Draw draw) {
  VerifyArgs args;
  args.target_logits = named.read("target_logits", kRealDTypes, Layout::rows);
  args.row_offsets = named.read("row_offsets", kIndexDTypes);
  args.draft_tokens = named.read("draft_tokens", kIndexDTypes);
  args.parents = named.read("parents", kIndexDTypes);
  args.num_drafts = named.read("num_drafts", DType::int32);
  args.draft_logits = named.read("draft_logits", kRealDTypes, Layout::rows);
  args.draft_probs = named.read("draft_probs", kRealDTypes, Layout::rows);
  args.draft_row = named.read("draft_row", DType::int32);
  args.vocab_map = named.read("vocab_map", DType::int32);
  args.bitmask = named.read("bitmask", DType::int32);
  args.base = named.read("base", DType::int64);
  args.slots = named.read("slots", DType::int32);
  args.history.tokens = named.read("history", kIndexDTypes);
  args.history.prompt_lengths = named.read("prompt_lengths", kIndexDTypes);
  args.rules = named.read("rules", DType::uint8);
  args.rule = rule;
  args.draw = draw;
  return args;
}

SampleArgs sample_args(Named named, int64_t vocab_size) {
  SampleArgs args;
  args.logits = named.read("logits", kRealDTypes, Layout::rows);
  args.base = named.read("base", DType::int64);
  args.slots = named.read("slots", DType::int32);
  args.bitmask = named.read("bitmask", DType::int32);
  args.path = named.read("path", kIndexDTypes);
  args.vocab_map = named.read("vocab_map", DType::int32);
  args.history.tokens = named.read("history", kIndexDTypes);
  args.history.prompt_lengths = named.read("prompt_lengths", kIndexDTypes);
  args.emitted_vocab = args.vocab_map ? vocab_size : args.logits.shape[1];
  return args;
}

py::object place(const void* at, const void* workspace) {
  if (at == nullptr) return py::none();
  return py::cast(static_cast<const char*>(at) - static_cast<const char*>(workspace));
}

template <class Args>
py::dict run(Intake& intake, const Args& args, py::handle workspace, int64_t least_blocks) {
  const Preparation what = preparation_of(args);
  py::dict result;
  result["bytes"] = what.bytes;
  if (workspace.is_none()) return result;
  const TensorView memory = intake.write(workspace, "workspace", DType::uint8, {Dim::at_least(what.bytes)});
  const PreparedRows rows =
      dispatch::prepare(args, what, memory.data, intake.device(), intake.stream(), least_blocks);
  result["target"] = place(rows.target, memory.data);
  result["draft"] = place(rows.draft, memory.data);
  result["mapped"] = place(rows.mapped, memory.data);
  result["draft_unsound"] = place(rows.draft_unsound, memory.data);
  result["history_unusable"] = place(rows.history_unusable, memory.data);
  result["draft_rows"] = rows.draft_rows;
  result["draft_size"] = rows.draft_size;
  result["draft_by_node"] = rows.draft_by_node;
  return result;
}

py::dict prepare_verify(const py::dict& tensors, const SamplingTable& sampling,
                        const SamplingTable& draft_sampling, Rule rule, Draw draw, py::handle workspace,
                        int64_t least_blocks) {
  Intake intake("prepare_verify");
  VerifyArgs args = verify_args({intake, tensors}, rule, draw);
  args.sampling = sampling.view(intake.device(), intake.stream());
  args.draft_sampling = draft_sampling.view(intake.device(), intake.stream());
  return run(intake, args, workspace, least_blocks);
}

py::dict prepare_sample(const py::dict& tensors, const SamplingTable& sampling, int64_t vocab_size,
                        py::handle workspace, int64_t least_blocks) {
  Intake intake("prepare_sample");
  SampleArgs args = sample_args({intake, tensors}, vocab_size);
  args.sampling = sampling.view(intake.device(), intake.stream());
  return run(intake, args, workspace, least_blocks);
}

const int32_t* bits_at(const TensorView& mask, int64_t offset) {
  return mask ? static_cast<const int32_t*>(mask.data) + offset : nullptr;
}

int64_t stride_of(const TensorView& mask) { return mask ? mask.strides[mask.rank - 1] : 0; }

py::array_t<float> array_of(const cpu::Row& row) {
  py::array_t<float> result(static_cast<py::ssize_t>(row.size));
  for (int64_t i = 0; i < row.size; ++i) result.mutable_at(static_cast<py::ssize_t>(i)) = row.at(i);
  return result;
}

py::array_t<float> array_of(const std::vector<float>& row) {
  return array_of(cpu::Row{row.data(), DType::float32, static_cast<int64_t>(row.size())});
}

// One row as the CPU edits it. "target": `row` is the number of a row of target_logits in its request, or of
// all with row offsets; "draft" and "mapped": of the declared law. With mapped: whether the row is sound.
py::tuple edited_row(const py::dict& tensors, const SamplingTable& sampling,
                     const SamplingTable& draft_sampling, const std::string& kind, int64_t b, int64_t row,
                     const std::vector<int64_t>& path) {
  Intake intake("edited_row");
  VerifyArgs args = verify_args({intake, tensors}, Rule::automatic, Draw::iid);
  args.sampling = sampling.view();
  args.draft_sampling = draft_sampling.view();
  const TensorView none, &logits = args.target_logits, &mask = args.bitmask;
  const int64_t vocab = logits.shape[logits.rank - 1], base = cpu::read_index(args.base, b);
  const int64_t slot = args.slots ? cpu::read_index(args.slots, b) : b;
  std::vector<float> out;
  if (kind == "target") {
    const cpu::LogitEdits edits(args.sampling, slot, args.history, base, vocab, none);
    const auto offset = [&](const TensorView& of) {
      return of.rank == 2 ? cpu::offset_of(of, row) : cpu::offset_of(of, b, row);
    };
    edits.edit(cpu::row_at(logits, offset(logits)), path, bits_at(mask, mask ? offset(mask) : 0),
               stride_of(mask), out);
    return py::make_tuple(array_of(out), true);
  }
  const cpu::LogitEdits edits(args.draft_sampling, slot, args.history, base, vocab, args.vocab_map);
  if (kind == "draft") {
    cpu::Row law = cpu::row_at(args.draft_logits, cpu::offset_of(args.draft_logits, b, row));
    if (!args.vocab_map && law.size > vocab) law.size = vocab;
    edits.edit(law, path, nullptr, 0, out);
    return py::make_tuple(array_of(out), true);
  }
  cpu::Processing plain;
  const cpu::DraftLaw law = cpu::draft_law_at(args, b, row, plain, edits, path, vocab);
  return py::make_tuple(array_of(law.row), law.law.usable);
}

py::array_t<float> edited_sample_row(const py::dict& tensors, const SamplingTable& sampling,
                                     int64_t vocab_size, int64_t b, const std::vector<int64_t>& path) {
  Intake intake("edited_sample_row");
  SampleArgs args = sample_args({intake, tensors}, vocab_size);
  const int64_t slot = args.slots ? cpu::read_index(args.slots, b) : b;
  const cpu::LogitEdits edits(sampling.view(), slot, args.history, cpu::read_index(args.base, b),
                              args.emitted_vocab, args.vocab_map);
  std::vector<float> out;
  const TensorView& mask = args.bitmask;
  edits.edit(cpu::row_at(args.logits, cpu::offset_of(args.logits, b)), path,
             bits_at(mask, mask ? cpu::offset_of(mask, b) : 0), stride_of(mask), out);
  return array_of(out);
}

}  // namespace

void register_testing_prepare(py::module_& testing) {
  testing.def("prepare_verify", &prepare_verify, py::arg("tensors"), py::arg("sampling"),
              py::arg("draft_sampling"), py::arg("rule"), py::arg("draw"), py::arg("workspace"),
              py::arg("least_blocks"),
              "Edited rows of a verification in `workspace`: where in it they lie, in bytes. Without a "
              "workspace: its size.");
  testing.def("prepare_sample", &prepare_sample, py::arg("tensors"), py::arg("sampling"),
              py::arg("vocab_size"), py::arg("workspace"), py::arg("least_blocks"));
  testing.def("edited_row", &edited_row, py::arg("tensors"), py::arg("sampling"), py::arg("draft_sampling"),
              py::arg("kind"), py::arg("b"), py::arg("row"), py::arg("path"),
              "(row, whether it is sound) as the CPU edits it.");
  testing.def(
      "needs_history",
      [](const SamplingTable& sampling, int64_t slot) {
        const SamplingView view = sampling.view();
        return view.constraints != nullptr && view.constraints[slot].needs_history();
      },
      py::arg("sampling"), py::arg("slot"));
  testing.def("edited_sample_row", &edited_sample_row, py::arg("tensors"), py::arg("sampling"),
              py::arg("vocab_size"), py::arg("b"), py::arg("path"));
}

}  // namespace foretoken

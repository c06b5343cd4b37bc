// ops.draft_topk and ops.finalize_tree.
#include <pybind11/pybind11.h>

#include "bindings/boundary.hpp"
#include "bindings/op_checks.hpp"
#include "dispatch.hpp"
#include "math/draft_tree.hpp"
#include "math/tree_index.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::Intake;
using boundary::kIndexDTypes;
using boundary::kRealDTypes;
using boundary::Layout;

void check_range(const char* name, int64_t low, int64_t high, int64_t value) {
  if (value >= low && value <= high) return;
  throw py::value_error(std::string(name) + ": expected " + std::to_string(low) + " to " +
                        std::to_string(high) + ", got " + std::to_string(value));
}

// Arguments that come as [B, n, ..], or as [R, ..] where each of R requests has one frontier node.
class Frontier {
 public:
  Frontier(Intake& intake, py::handle logits) : intake_(intake) {
    flat_ = intake.rank_of(logits, "logits") == 2;
    logits_ = flat_
                  ? with_nodes(intake.read(logits, "logits", kRealDTypes,
                                           {Dim::bind(batch_, "R"), Dim::bind(vocab_, "V", 1)}))
                  : intake.read(logits, "logits", kRealDTypes,
                                {Dim::bind(batch_, "B"), Dim::bind(nodes_, "n"), Dim::bind(vocab_, "V", 1)});
    check_vocab("logits", vocab_);
  }

  TensorView logits() const { return logits_; }
  int64_t nodes() const { return nodes_; }
  int64_t batch() const { return batch_; }

  TensorView read_or_null(py::handle object, const char* name, boundary::DTypes dtypes) {
    if (flat_) return with_nodes(intake_.read_or_null(object, name, dtypes, {batch_}, Layout::any));
    return intake_.read_or_null(object, name, dtypes, {batch_, nodes_}, Layout::any);
  }

  TensorView write(py::handle object, const char* name, DType dtype) {
    if (flat_) return with_nodes(intake_.write(object, name, dtype, {batch_}, Layout::any));
    return intake_.write(object, name, dtype, {batch_, nodes_}, Layout::any);
  }

  TensorView write(py::handle object, const char* name, DType dtype, int64_t k) {
    if (flat_) return with_nodes(intake_.write(object, name, dtype, {batch_, k}, Layout::any));
    return intake_.write(object, name, dtype, {batch_, nodes_, k}, Layout::any);
  }

 private:
  // [R, ..] as [R, 1, ..].
  static TensorView with_nodes(TensorView view) {
    if (!view) return view;
    for (int32_t dim = view.rank; dim > 1; --dim) {
      view.shape[dim] = view.shape[dim - 1];
      view.strides[dim] = view.strides[dim - 1];
    }
    view.shape[1] = 1;
    view.strides[1] = 0;
    ++view.rank;
    return view;
  }

  Intake& intake_;
  bool flat_ = false;
  int64_t batch_ = 0, nodes_ = 1, vocab_ = 0;
  TensorView logits_;
};

void draft_topk(py::handle logits, int64_t k, py::handle scores, py::handle entries, py::handle tokens,
                py::handle children_scores, py::handle parents, py::handle status) {
  check_range("k", 1, kMaxChildren, k);
  Intake intake("draft_topk");
  Frontier frontier(intake, logits);
  DraftTopkArgs args;
  args.logits = frontier.logits();
  args.scores = frontier.read_or_null(scores, "scores", DType::float32);
  args.entries = frontier.read_or_null(entries, "entries", kIndexDTypes);
  if (entries.is_none() && frontier.nodes() > 1) {
    throw py::value_error("entries: expected the candidate indices int32 or int64 [" +
                          std::to_string(frontier.batch()) + ", " + std::to_string(frontier.nodes()) +
                          "] of the frontier nodes (only one of them can be the root), got None");
  }
  args.tokens = frontier.write(tokens, "out.tokens", DType::int32, k);
  args.children_scores = frontier.write(children_scores, "out.scores", DType::float32, k);
  args.parents = frontier.write(parents, "out.parents", DType::int32, k);
  args.status = frontier.write(status, "out.status", DType::int32);
  const Device device = intake.device();
  const Stream stream = intake.stream();
  py::gil_scoped_release unlocked;
  dispatch::draft_topk(args, device, stream);
}

void finalize_tree(py::handle candidates, py::handle scores, py::handle parents, int64_t num_nodes,
                   py::handle budget, py::handle lengths, py::handle tokens, py::handle kept_parents,
                   py::handle num_drafts, py::handle source, py::handle depth, py::handle first_child,
                   py::handle next_sibling, py::handle ancestors, py::handle positions, py::handle status) {
  constexpr auto any = Layout::any;
  check_range("num_nodes", 0, kMaxDrafts, num_nodes);
  Intake intake("finalize_tree");
  FinalizeTreeArgs args;
  int64_t batch = 0, count = 0;
  args.candidates =
      intake.read(candidates, "tokens", kIndexDTypes, {Dim::bind(batch, "B"), Dim::bind(count, "M")}, any);
  if (count > kMaxCandidates) {
    throw py::value_error("tokens: expected at most " + std::to_string(kMaxCandidates) +
                          " candidates a row, got " + std::to_string(count));
  }
  args.scores = intake.read(scores, "scores", DType::float32, {batch, count}, any);
  args.parents = intake.read(parents, "parents", kIndexDTypes, {batch, count}, any);
  args.budget = intake.read_or_null(budget, "budget", DType::int32, {batch}, any);
  args.tokens = intake.write(tokens, "out.tokens", args.candidates.dtype, {batch, num_nodes}, any);
  args.source = intake.write(source, "out.source", DType::int32, {batch, num_nodes}, any);
  TreeIndexArgs& index = args.index;
  index.parents = intake.write(kept_parents, "out.parents", DType::int32, {batch, num_nodes}, any);
  index.num_drafts = intake.write(num_drafts, "out.num_drafts", DType::int32, {batch}, any);
  index.lengths = intake.read_or_null(lengths, "lengths", DType::int64, {batch}, any);
  check_positions(lengths, positions);
  write_index_arrays(intake, index, batch, num_nodes, depth, first_child, next_sibling, ancestors, positions,
                     status);
  const Device device = intake.device();
  const Stream stream = intake.stream();
  py::gil_scoped_release unlocked;
  dispatch::finalize_tree(args, device, stream);
}

}  // namespace

void register_draft_tree(py::module_& module) {
  module.def("draft_topk", &draft_topk, py::arg("logits"), py::arg("k"), py::arg("scores"),
             py::arg("entries"), py::arg("out_tokens"), py::arg("out_scores"), py::arg("out_parents"),
             py::arg("out_status"), "See foretoken.ops.draft_topk.");
  module.def("finalize_tree", &finalize_tree, py::arg("tokens"), py::arg("scores"), py::arg("parents"),
             py::arg("num_nodes"), py::arg("budget"), py::arg("lengths"), py::arg("out_tokens"),
             py::arg("out_parents"), py::arg("out_num_drafts"), py::arg("out_source"), py::arg("out_depth"),
             py::arg("out_first_child"), py::arg("out_next_sibling"), py::arg("out_ancestors"),
             py::arg("out_positions"), py::arg("out_status"), "See foretoken.ops.finalize_tree.");
}

}  // namespace foretoken

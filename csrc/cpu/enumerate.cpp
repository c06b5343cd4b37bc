#include "cpu/enumerate.hpp"

#include <algorithm>

#include "cpu/exact_rows.hpp"
#include "cpu/tree_rows.hpp"

namespace foretoken::cpu {

namespace {

// Depth-first over all outcomes of a run's decisions: replays a prefix of outcomes, extends it with the
// first.
class Script {
 public:
  bool token(int32_t, double target_prob, double draft_prob) {
    return decide(draft_prob > target_prob ? target_prob / draft_prob : target_prob > 0.0 ? 1.0 : 0.0);
  }
  bool fraction(int32_t, double h) { return decide(h); }
  bool may_pass(int32_t, double) const { return true; }

  template <class Rows>
  int64_t choose(Rows& rows, int32_t node) {
    const std::vector<double> law = normalised(rows.weights_of_target(node));
    const size_t choice = next_outcome(law.size());
    probability_ *= law[choice];
    return static_cast<int64_t>(choice);
  }

  void restart() {
    position_ = 0;
    probability_ = 1.0;
  }

  bool next() {
    while (!outcomes_.empty() && outcomes_.back().choice + 1 == outcomes_.back().options)
      outcomes_.pop_back();
    if (outcomes_.empty()) return false;
    ++outcomes_.back().choice;
    return true;
  }

  double probability() const { return probability_; }

 private:
  struct Outcome {
    size_t choice, options;
  };

  bool decide(double yes) {
    const bool accepted = next_outcome(2) == 0;
    probability_ *= accepted ? yes : 1.0 - yes;
    return accepted;
  }

  size_t next_outcome(size_t options) {
    if (position_ == outcomes_.size()) outcomes_.push_back({0, options});
    return outcomes_[position_++].choice;
  }

  std::vector<Outcome> outcomes_;
  size_t position_ = 0;
  double probability_ = 1.0;
};

// Rows are made anew for every run: a walk may change them.
template <class MakeRows, class ClosingLaw>
std::vector<Branch> enumerate(const TreeCase& tree, MakeRows make_rows, ClosingLaw closing_law) {
  std::vector<Branch> branches;
  std::vector<NodeState> states(kMaxNodes);
  Script script;
  do {
    script.restart();
    auto rows = make_rows();
    const TreeVerdict verdict = walk(rows, rows.tree(), tree.options, states.data(), script);
    if (script.probability() > 0.0) {
      branches.push_back({script.probability(), verdict.node, closing_law(rows, verdict)});
    }
  } while (script.next());
  return branches;
}

TensorView view_of(void* data, DType dtype, std::initializer_list<int64_t> shape) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.rank = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), view.shape);
  int64_t stride = 1;
  for (int32_t axis = view.rank - 1; axis >= 0; --axis) {
    view.strides[axis] = stride;
    stride *= view.shape[axis];
  }
  return view;
}

SamplingView sampling_of(const Processing& processing, const uint64_t* seed) {
  return {&processing.temperature, &processing.top_k, &processing.top_p, &processing.min_p, seed, 1};
}

std::vector<double> closing_law_of(TreeRows& rows, const TreeVerdict& verdict, int64_t vocab) {
  std::vector<double> law(static_cast<size_t>(vocab), 0.0);
  if (verdict.closing == Closing::argmax || verdict.closing == Closing::chosen || rows.greedy()) {
    const bool chosen = verdict.closing == Closing::chosen;
    law[static_cast<size_t>(chosen ? verdict.token : rows.target_law(verdict.node).top)] = 1.0;
    return law;
  }
  std::vector<uint64_t> masses(static_cast<size_t>(vocab));
  all_masses(rows.closing_of(verdict), masses.data());
  uint64_t total = 0;
  for (uint64_t mass : masses) total += mass;
  if (total == 0) all_masses(rows.whole(verdict.node), masses.data());
  return normalised(std::vector<double>(masses.begin(), masses.end()));
}

}  // namespace

std::vector<Branch> enumerate_float32(const TreeCase& tree) {
  const int64_t drafts = static_cast<int64_t>(tree.tokens.size());
  const int64_t vocab = static_cast<int64_t>(tree.target[0].size());
  std::vector<float> target, draft;
  std::vector<int32_t> draft_row;
  std::vector<int64_t> tokens = tree.tokens, parents = tree.parents, out(static_cast<size_t>(drafts) + 1);
  for (const auto& row : tree.target) target.insert(target.end(), row.begin(), row.end());
  for (size_t i = 0; i < tree.draft.size(); ++i) {
    draft_row.push_back(tree.draft[i].empty() ? -1 : static_cast<int32_t>(i));
    std::vector<double> row = tree.draft[i];
    row.resize(static_cast<size_t>(vocab));
    draft.insert(draft.end(), row.begin(), row.end());
  }
  const uint64_t seed = 0;
  int64_t base = 0;
  VerifyArgs args;
  args.target_logits = view_of(target.data(), DType::float32, {1, drafts + 1, vocab});
  args.draft_tokens = view_of(tokens.data(), DType::int64, {1, drafts});
  args.parents = view_of(parents.data(), DType::int64, {1, drafts});
  args.draft_row = view_of(draft_row.data(), DType::int32, {1, drafts + 1});
  args.base = view_of(&base, DType::int64, {1});
  args.tokens = view_of(out.data(), DType::int64, {1, drafts + 1});
  (tree.draft_is_probs ? args.draft_probs : args.draft_logits) =
      view_of(draft.data(), DType::float32, {1, drafts + 1, vocab});
  args.sampling = sampling_of(tree.processing, &seed);
  args.draft_sampling = sampling_of(tree.draft_processing, &seed);
  args.draw = tree.options.draw;
  args.num_paths = tree.options.num_paths;
  const auto make_rows = [&] {
    TreeRows rows(args, 0, 0);
    rows.take_proposal(static_cast<int32_t>(drafts), tree.options.rule, false);
    return rows;
  };
  if (make_rows().tree().nodes != drafts + 1) return {};
  return enumerate(tree, make_rows, [&](TreeRows& rows, const TreeVerdict& verdict) {
    return closing_law_of(rows, verdict, vocab);
  });
}

std::vector<Branch> enumerate_float64(const TreeCase& tree) {
  return enumerate(
      tree, [&] { return ExactRows(tree); },
      [](const ExactRows& rows, const TreeVerdict& verdict) { return rows.closing(verdict); });
}

}  // namespace foretoken::cpu

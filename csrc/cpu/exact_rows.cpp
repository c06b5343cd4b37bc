#include "cpu/exact_rows.hpp"

#include <algorithm>
#include <cmath>
#include <functional>

#include "cpu/first_path.hpp"

namespace foretoken::cpu {

namespace {

std::vector<double> filtered(std::vector<double> weights, const Processing& processing) {
  std::vector<double> sorted = weights;
  std::sort(sorted.begin(), sorted.end(), std::greater<double>());
  double threshold = 0.0;
  if (processing.top_k > 0 && processing.top_k < static_cast<int32_t>(sorted.size())) {
    threshold = sorted[static_cast<size_t>(processing.top_k - 1)];
  }
  if (processing.top_p < 1.0f) {
    double total = 0.0, reached = 0.0;
    for (double weight : sorted) total += weight >= threshold ? weight : 0.0;
    for (double weight : sorted) {
      reached += weight;
      threshold =
          std::max(threshold, reached >= static_cast<double>(processing.top_p) * total ? weight : 0.0);
    }
  }
  threshold = std::max(threshold, static_cast<double>(processing.min_p) * sorted[0]);
  for (double& weight : weights) weight = weight >= threshold ? weight : 0.0;
  return weights;
}

}  // namespace

double total_of(const std::vector<double>& weights) {
  double total = 0.0;
  for (double weight : weights) total += weight;
  return total;
}

std::vector<double> normalised(std::vector<double> weights) {
  const double total = total_of(weights);
  for (double& weight : weights) weight /= total;
  return weights;
}

std::vector<double> exact_law(const std::vector<double>& logits, const Processing& processing) {
  const auto top = std::max_element(logits.begin(), logits.end());
  std::vector<double> weights(logits.size(), 0.0);
  if (processing.temperature == 0.0f) {
    weights[static_cast<size_t>(top - logits.begin())] = 1.0;
    return weights;
  }
  for (size_t i = 0; i < logits.size(); ++i) {
    weights[i] = std::exp((logits[i] - *top) / static_cast<double>(processing.temperature));
  }
  return normalised(filtered(weights, processing));
}

ExactRows::ExactRows(const TreeCase& tree) : case_(tree) {
  build_tree(tree_, static_cast<int32_t>(tree.tokens.size()) + 1,
             [&](int32_t node) { return tree.parents[static_cast<size_t>(node - 1)]; });
  for (const auto& row : tree.target) target_.push_back(exact_law(row, tree.processing));
  for (const auto& row : tree.draft) {
    draft_.push_back(row.empty()           ? row
                     : tree.draft_is_probs ? normalised(row)
                                           : exact_law(row, tree.draft_processing));
  }
  ignore_ = greedy() || tree.options.draw == Draw::deterministic;
}

bool ExactRows::any_dense() const {
  for (int32_t node = 0; node < tree_.nodes; ++node) {
    if (tree_.first_child[node] != kNoNode && dense(node)) return true;
  }
  return false;
}

double ExactRows::target_prob(int32_t node, int32_t child) const {
  return target_[static_cast<size_t>(node)][static_cast<size_t>(token(child))];
}

double ExactRows::draft_prob(int32_t node, int32_t child) const {
  return draft_[static_cast<size_t>(node)][static_cast<size_t>(token(child))];
}

double ExactRows::left(int32_t node, int32_t count) const {
  std::vector<double> law = draft_[static_cast<size_t>(node)];
  int32_t child = tree_.first_child[node];
  for (int32_t i = 0; i < count; ++i, child = tree_.next_sibling[child])
    law[static_cast<size_t>(token(child))] = 0.0;
  return total_of(law);
}

bool ExactRows::removed(int32_t node, int32_t count, int32_t child) const {
  int32_t elder = tree_.first_child[node];
  for (int32_t i = 0; i < count; ++i, elder = tree_.next_sibling[elder]) {
    if (token(elder) == token(child)) return true;
  }
  return false;
}

double ExactRows::entropy(int32_t node) const {
  double sum = 0.0;
  for (double prob : target_[static_cast<size_t>(node)]) sum -= prob > 0.0 ? prob * std::log(prob) : 0.0;
  return sum;
}

double ExactRows::relative_prob(int32_t node, int32_t child) const {
  const auto& law = target_[static_cast<size_t>(node)];
  return target_prob(node, child) / *std::max_element(law.begin(), law.end());
}

bool ExactRows::among_top(int32_t node, int32_t child, int32_t k) const {
  const auto& law = target_[static_cast<size_t>(node)];
  const double bound = target_prob(node, child);
  return std::count_if(law.begin(), law.end(), [=](double prob) { return prob > bound; }) < k;
}

void ExactRows::keep_first_path(int32_t num_paths) { cpu::keep_first_path(*this, tree_, num_paths); }

std::vector<double> ExactRows::residual_weights(int32_t node, double gain) const {
  const auto& target = target_[static_cast<size_t>(node)];
  const auto& draft = draft_[static_cast<size_t>(node)];
  std::vector<double> weights(target.size());
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = std::max(0.0, target[i] - gain * draft[i]);
  return weights;
}

std::vector<double> ExactRows::closing(const TreeVerdict& verdict) const {
  const auto& target = target_[static_cast<size_t>(verdict.node)];
  std::vector<double> weights = target;
  if (verdict.closing == Closing::chosen) {
    weights.assign(target.size(), 0.0);
    weights[static_cast<size_t>(verdict.token)] = 1.0;
  } else if (verdict.closing == Closing::recovery && dense(verdict.node)) {
    weights = residual_weights(verdict.node, verdict.state.gain);
  } else if (verdict.closing == Closing::recovery) {
    int32_t child = tree_.first_child[verdict.node];
    for (int32_t i = 0; i < verdict.state.rejected; ++i, child = tree_.next_sibling[child]) {
      weights[static_cast<size_t>(token(child))] = 0.0;
    }
  }
  return total_of(weights) > 0.0 ? normalised(weights) : target;
}

}  // namespace foretoken::cpu

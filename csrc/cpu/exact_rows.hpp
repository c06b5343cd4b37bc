// Rows in double precision, with the interface of TreeRows: the textbook's numbers under the shipped walks.
#pragma once

#include "cpu/enumerate.hpp"

namespace foretoken::cpu {

std::vector<double> normalised(std::vector<double> weights);
double total_of(const std::vector<double>& weights);

// The law of a row of logits, filters as filters.cpp defines the kept set.
std::vector<double> exact_law(const std::vector<double>& logits, const Processing& processing);

class ExactRows {
 public:
  // The tree's parents are usable.
  explicit ExactRows(const TreeCase& tree);

  const TreeIndex& tree() const { return tree_; }
  bool greedy() const { return case_.processing.temperature == 0.0f; }
  void ignore_draft_laws() { ignore_ = true; }
  bool any_dense() const;
  int64_t token(int32_t node) const { return case_.tokens[static_cast<size_t>(node - 1)]; }

  bool usable(int32_t) const { return true; }
  bool dense(int32_t node) const { return !ignore_ && !draft_[static_cast<size_t>(node)].empty(); }
  double target_prob(int32_t node, int32_t child) const;
  double draft_prob(int32_t node, int32_t child) const;
  double residual(int32_t node, double gain) const { return total_of(residual_weights(node, gain)); }
  double left(int32_t node, int32_t count) const;
  bool removed(int32_t node, int32_t count, int32_t child) const;
  double entropy(int32_t node) const;
  double relative_prob(int32_t node, int32_t child) const;
  bool among_top(int32_t node, int32_t child, int32_t k) const;

  void keep_first_path(int32_t num_paths);
  const std::vector<double>& weights_of_target(int32_t node) const {
    return target_[static_cast<size_t>(node)];
  }
  const std::vector<double>& weights_of_draft(int32_t node) const {
    return draft_[static_cast<size_t>(node)];
  }
  void set_draft_law(int32_t node, const std::vector<double>& law) {
    draft_[static_cast<size_t>(node)] = law;
  }

  std::vector<double> closing(const TreeVerdict& verdict) const;

 private:
  std::vector<double> residual_weights(int32_t node, double gain) const;

  const TreeCase& case_;
  TreeIndex tree_;
  bool ignore_ = false;
  std::vector<std::vector<double>> target_, draft_;
};

}  // namespace foretoken::cpu

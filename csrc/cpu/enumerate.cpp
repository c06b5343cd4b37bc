#include "cpu/enumerate.hpp"

#include <algorithm>
#include <cmath>
#include <functional>

#include "cpu/chain_rows.hpp"

namespace foretoken::cpu {

namespace {

// Depth-first over all outcomes of a run's decisions: replays a prefix of outcomes, extends it with "yes".
class Script {
 public:
  bool token(int32_t, double target_prob, double draft_prob) {
    return decide(draft_prob > target_prob ? target_prob / draft_prob : target_prob > 0.0 ? 1.0 : 0.0);
  }
  bool fraction(int32_t, double h) { return decide(h); }

  void restart() {
    position_ = 0;
    probability_ = 1.0;
  }

  bool next() {
    while (!outcomes_.empty() && !outcomes_.back()) outcomes_.pop_back();
    if (outcomes_.empty()) return false;
    outcomes_.back() = false;
    return true;
  }

  double probability() const { return probability_; }

 private:
  bool decide(double yes) {
    if (position_ == outcomes_.size()) outcomes_.push_back(true);
    const bool outcome = outcomes_[position_++];
    probability_ *= outcome ? yes : 1.0 - yes;
    return outcome;
  }

  std::vector<bool> outcomes_;
  size_t position_ = 0;
  double probability_ = 1.0;
};

template <class Rows, class ClosingLaw>
std::vector<Branch> enumerate(Rows& rows, int32_t drafts, bool block, ClosingLaw closing_law) {
  std::vector<Branch> branches;
  Script script;
  do {
    script.restart();
    const ChainVerdict verdict = block ? walk_block(rows, drafts, script) : walk_token(rows, drafts, script);
    if (script.probability() > 0.0) {
      branches.push_back({script.probability(), verdict.accepted, closing_law(verdict)});
    }
  } while (script.next());
  return branches;
}

bool any_dense(const ChainCase& chain) {
  return std::any_of(chain.draft.begin(), chain.draft.end(), [](const auto& row) { return !row.empty(); });
}

bool wants_block(const ChainCase& chain) {
  if (chain.processing.temperature == 0.0f) return false;
  return chain.rule == Rule::block || (chain.rule == Rule::automatic && any_dense(chain));
}

std::vector<double> normalised(const std::vector<double>& weights) {
  double total = 0.0;
  for (double weight : weights) total += weight;
  std::vector<double> law = weights;
  for (double& value : law) value /= total;
  return law;
}

double total_of(const std::vector<double>& weights) {
  double total = 0.0;
  for (double weight : weights) total += weight;
  return total;
}

// Largest weight that every token of the kept set reaches, as filters.cpp defines the kept set.
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

std::vector<double> law_of(const std::vector<double>& logits, const Processing& processing) {
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

class ExactRows {
 public:
  explicit ExactRows(const ChainCase& chain) : chain_(chain) {
    for (const auto& row : chain.target) target_.push_back(law_of(row, chain.processing));
    for (size_t i = 0; i < chain.tokens.size(); ++i) {
      std::vector<double> law(chain.target[0].size(), 0.0);
      if (chain.draft[i].empty()) {
        law[static_cast<size_t>(chain.tokens[i])] = 1.0;
      } else {
        law = chain.draft_is_probs ? normalised(chain.draft[i])
                                   : law_of(chain.draft[i], chain.draft_processing);
      }
      draft_.push_back(law);
    }
  }

  bool usable(int32_t) const { return true; }
  double target_prob(int32_t row) const { return target_[static_cast<size_t>(row)][drafted(row + 1)]; }
  double draft_prob(int32_t node) const { return draft_[static_cast<size_t>(node - 1)][drafted(node)]; }
  double residual(int32_t node, double prefix) const { return total_of(residual_weights(node, prefix)); }

  std::vector<double> closing(const ChainVerdict& verdict) const {
    if (verdict.closing == Closing::bonus) return target_[static_cast<size_t>(verdict.accepted)];
    const std::vector<double> weights = residual_weights(verdict.accepted + 1, verdict.prefix);
    return total_of(weights) > 0.0 ? normalised(weights) : target_[static_cast<size_t>(verdict.accepted)];
  }

 private:
  size_t drafted(int32_t node) const {
    return static_cast<size_t>(chain_.tokens[static_cast<size_t>(node - 1)]);
  }

  std::vector<double> residual_weights(int32_t node, double prefix) const {
    const auto& target = target_[static_cast<size_t>(node - 1)];
    const auto& draft = draft_[static_cast<size_t>(node - 1)];
    std::vector<double> weights(target.size());
    for (size_t i = 0; i < weights.size(); ++i) weights[i] = std::max(0.0, prefix * target[i] - draft[i]);
    return weights;
  }

  const ChainCase& chain_;
  std::vector<std::vector<double>> target_, draft_;
};

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

}  // namespace

std::vector<Branch> enumerate_float32(const ChainCase& chain) {
  const int64_t drafts = static_cast<int64_t>(chain.tokens.size());
  const int64_t vocab = static_cast<int64_t>(chain.target[0].size());
  std::vector<float> target, draft;
  std::vector<int32_t> draft_row;
  std::vector<int64_t> tokens = chain.tokens;
  for (const auto& row : chain.target) target.insert(target.end(), row.begin(), row.end());
  for (size_t i = 0; i < chain.draft.size(); ++i) {
    draft_row.push_back(chain.draft[i].empty() ? -1 : static_cast<int32_t>(i));
    std::vector<double> row = chain.draft[i];
    row.resize(static_cast<size_t>(vocab));
    draft.insert(draft.end(), row.begin(), row.end());
  }
  const uint64_t seed = 0;
  VerifyArgs args;
  args.target_logits = view_of(target.data(), DType::float32, {1, drafts + 1, vocab});
  args.draft_tokens = view_of(tokens.data(), DType::int64, {1, drafts});
  args.draft_row = view_of(draft_row.data(), DType::int32, {1, drafts});
  (chain.draft_is_probs ? args.draft_probs : args.draft_logits) =
      view_of(draft.data(), DType::float32, {1, drafts, vocab});
  args.sampling = sampling_of(chain.processing, &seed);
  args.draft_sampling = sampling_of(chain.draft_processing, &seed);
  ChainRows rows(args, 0, 0);
  return enumerate(rows, static_cast<int32_t>(drafts), wants_block(chain), [&](const ChainVerdict& verdict) {
    std::vector<double> law(static_cast<size_t>(vocab), 0.0);
    if (verdict.closing == Closing::argmax || rows.greedy()) {
      law[static_cast<size_t>(rows.target_law(verdict.accepted).top)] = 1.0;
      return law;
    }
    std::vector<uint64_t> masses(static_cast<size_t>(vocab));
    all_masses(closing_of(rows, verdict), masses.data());
    uint64_t total = 0;
    for (uint64_t mass : masses) total += mass;
    if (total == 0) all_masses(rows.whole(verdict.accepted), masses.data());
    return normalised(std::vector<double>(masses.begin(), masses.end()));
  });
}

std::vector<Branch> enumerate_float64(const ChainCase& chain) {
  ExactRows rows(chain);
  return enumerate(rows, static_cast<int32_t>(chain.tokens.size()), wants_block(chain),
                   [&](const ChainVerdict& verdict) { return rows.closing(verdict); });
}

}  // namespace foretoken::cpu

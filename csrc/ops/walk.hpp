// Which walk a rule means, over any rows and any coins.
#pragma once

#include "math/exp_log.hpp"
#include "math/lossy_walk.hpp"
#include "ops/verify.hpp"

namespace foretoken {

struct WalkOptions {
  Rule rule = Rule::automatic;
  Draw draw = Draw::iid;
  int32_t num_paths = 1;
  Tolerance tolerance;
};

// exp(-nats), the same on every device.
FORETOKEN_HD inline double exp_minus(double nats) {
  return nats < 80.0 ? static_cast<double>(exp2_scaled(static_cast<float>(-nats), static_cast<float>(kLog2E)))
                     : 0.0;
}

template <class Rows, class Decisions>
FORETOKEN_HD_OUTLINE TreeVerdict walk_lossy(Rows& rows, const TreeIndex& tree, const WalkOptions& options,
                                            Decisions& decide) {
  const Tolerance& tolerance = options.tolerance;
  const auto typical = [&](int32_t row, int32_t node) {
    const double bound = static_cast<double>(tolerance.typical_delta) * exp_minus(rows.entropy(row));
    return accepts_typical(rows.target_prob(row, node), static_cast<double>(tolerance.typical_epsilon),
                           bound);
  };
  const auto relaxed = [&](int32_t row, int32_t node) {
    return is_near(rows.relative_prob(row, node), exp_minus(static_cast<double>(tolerance.relaxed_delta))) &&
           rows.among_top(row, node, tolerance.relaxed_top_k);
  };
  switch (options.rule) {
    case Rule::lossy_typical: return walk_acceptable(rows, tree, typical);
    case Rule::lossy_relaxed: return walk_acceptable(rows, tree, relaxed);
    case Rule::lossy_threshold:
      rows.ignore_draft_laws();
      return walk_threshold(rows, tree, static_cast<double>(tolerance.threshold_single),
                            static_cast<double>(tolerance.threshold_sum), decide);
    case Rule::lossy_entropy_window:
      return walk_entropy_window(rows, tree, static_cast<double>(tolerance.window_entropy),
                                 exp_minus(static_cast<double>(tolerance.window_delta)),
                                 options.draw == Draw::without_replacement, decide);
    default: return walk_synthetic(rows, tree, tolerance.rates, tolerance.num_rates, decide);
  }
}

// `states` has room for the nodes of the tree.
template <class Rows, class Decisions>
FORETOKEN_HD_OUTLINE TreeVerdict walk(Rows& rows, const TreeIndex& tree, const WalkOptions& options,
                                      NodeState* states, Decisions& decide) {
  const bool without_replacement = options.draw == Draw::without_replacement;
  const Siblings siblings = without_replacement ? Siblings::without_replacement : Siblings::independent;
  if (options.rule == Rule::lossy_synthetic) return walk_lossy(rows, tree, options, decide);
  if (rows.greedy())
    return walk_siblings(rows, tree, siblings, decide);  // every rule is exact at temperature 0
  if (options.rule >= Rule::lossy_typical) return walk_lossy(rows, tree, options, decide);
  if (options.rule == Rule::coupled) return walk_coupled(rows, tree, decide);
  if (options.rule == Rule::target_only) rows.ignore_draft_laws();
  // With point laws alone no walk keeps more than the siblings' one, and it reads the fewest rows.
  const bool drawn = rows.any_dense();
  switch (options.rule) {
    case Rule::traversal: return walk_traversal(rows, tree, without_replacement, states, decide);
    case Rule::spectr: return walk_siblings(rows, tree, Siblings::transport, decide);
    case Rule::gbv:
      if (!drawn) break;
      rows.keep_first_path(options.num_paths);
      return walk_traversal(rows, tree, without_replacement, states, decide);
    case Rule::automatic:
      if (drawn) return walk_mixed(rows, tree, without_replacement, states, decide);
      break;
    default: break;
  }
  return walk_siblings(rows, tree, siblings, decide);
}

}  // namespace foretoken

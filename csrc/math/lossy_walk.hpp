// Walks that do not keep the target's law. All but the synthetic one keep this much of it: a token without
// mass, because a grammar or a filter took it, stays out however loose the tolerance. Besides the rows of
// tree_walk.hpp they ask for
//   double entropy(row)                  of the target's law, in nats
//   double relative_prob(row, node)      target probability of the token over that of the likeliest one
//   bool among_top(row, node, k)         fewer than k tokens are likelier
#pragma once

#include "math/tree_walk.hpp"

namespace foretoken {

FORETOKEN_HD inline bool is_near(double relative, double least) {
  return relative > 0.0 && relative >= least;
}

// The deepest node all of whose path is acceptable, the first of them on ties; `acceptable(row, node)` throws
// no coin. The closing token comes from the target's own row there.
template <class Rows, class Acceptable>
FORETOKEN_HD_OUTLINE TreeVerdict walk_acceptable(Rows& rows, const TreeIndex& tree, Acceptable acceptable) {
  bool kept[kMaxNodes];
  kept[0] = true;
  int32_t best = 0;
  for (int32_t node = 1; node < tree.nodes; ++node) {  // parents come first
    const int32_t parent = tree.parent[node];
    kept[node] = kept[parent] && rows.usable(parent) && acceptable(parent, node);
    if (kept[node] && tree.depth[node] > tree.depth[best]) best = node;
  }
  return stop_at(rows, best, NodeState{});
}

// SGLang's thresholds: one coin a level against the summed probability of the children so far, over
// `threshold_sum`; or a probability of `threshold_single` alone. Both at 1: the lossless target-only walk.
// The coin is asked child by child, with the chance that is left.
template <class Rows, class Decisions>
FORETOKEN_HD_OUTLINE TreeVerdict walk_threshold(Rows& rows, const TreeIndex& tree, double threshold_single,
                                                double threshold_sum, Decisions& decide) {
  int32_t node = 0;
  while (true) {
    NodeState state;
    if (!rows.usable(node)) return {node, Closing::argmax, state};
    double sum = 0.0, passed = 0.0;  // passed: chance with which an elder sibling would have been accepted
    int32_t child = tree.first_child[node];
    for (; child != kNoNode; child = tree.next_sibling[child]) {
      const double target = rows.removed(node, state.rejected, child) ? 0.0 : rows.target_prob(node, child);
      sum += target;
      const double chance = sum < threshold_sum ? sum / threshold_sum : 1.0;
      const double h = passed < 1.0 ? (chance - passed) / (1.0 - passed) : 1.0;
      if ((target > 0.0 && target >= threshold_single) || decide.fraction(child, h)) break;
      passed = chance;
      ++state.rejected;
    }
    if (child == kNoNode) return stop_at(rows, node, state);
    node = child;
  }
}

// Relaxed where the target is sure of itself (entropy <= window): the first child within `delta` nats of the
// likeliest token is kept, and a row without one closes from the target. Elsewhere the sibling walk.
template <class Rows, class Decisions>
FORETOKEN_HD_OUTLINE TreeVerdict walk_entropy_window(Rows& rows, const TreeIndex& tree, double window,
                                                     double least_relative, bool without_replacement,
                                                     Decisions& decide) {
  int32_t node = 0;
  while (true) {
    NodeState state;
    if (!rows.usable(node)) return {node, Closing::argmax, state};
    const bool relaxed = rows.entropy(node) <= window;
    int32_t child = tree.first_child[node];
    for (; child != kNoNode; child = tree.next_sibling[child]) {
      if (relaxed) {
        if (is_near(rows.relative_prob(node, child), least_relative)) break;
        continue;
      }
      const double target = left_of_target(rows, node, state, child);
      if (decide.token(child, target, left_of_draft(rows, node, state, child))) break;
      const bool more = tree.next_sibling[child] != kNoNode;
      reject(rows, node, state, child, 1.0, more, more && without_replacement);
    }
    if (child == kNoNode) return stop_at(rows, node, state);
    node = child;
  }
}

// The first child of a node is kept at the given rate of its depth, whatever the models say.
template <class Rows, class Decisions>
FORETOKEN_HD_OUTLINE TreeVerdict walk_synthetic(Rows& rows, const TreeIndex& tree, const float* rates,
                                                int64_t num_rates, Decisions& decide) {
  int32_t node = 0;
  while (tree.first_child[node] != kNoNode && rows.usable(node)) {
    const int32_t child = tree.first_child[node];
    const int32_t depth = tree.depth[child];
    if (!decide.fraction(child, depth <= num_rates ? static_cast<double>(rates[depth - 1]) : 0.0)) break;
    node = child;
  }
  return stop_at(rows, node, NodeState{});
}

}  // namespace foretoken

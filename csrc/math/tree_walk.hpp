// The walks over a draft tree: which path stays, and from what the closing token is drawn. Written once over
// two small interfaces, so that the shipped coins and the tests' enumerated ones run the same decisions:
//
//   Rows       bool usable(row)                        the target's row behind a node has a law
//              bool dense(row)                         the children of this node were drawn from a law
//              double target_prob(row, node)           of the token of `node`, a child of `row`
//              double draft_prob(row, node)            the same under the children's law; dense rows only
//              double residual(row, gain)              mass of [target - gain * draft]+; dense rows only
//              double left(row, count)                 draft mass without the first `count` children
//              bool removed(row, count, node)          one of the first `count` children has the same token
//   Decisions  bool token(node, target_prob, draft_prob);  bool fraction(node, h)
//              bool may_pass(node, bound)              false only if fraction(node, h) is, whatever h <=
//              bound
//
// Rejecting a child replaces the target law p by norm([p - q]+). Done again and again this stays of one
// shape, p_k = [p - gain * q]+ / rest, so the state of a node is four numbers whatever the vocabulary:
//   [ [p - g q]+ / s - q / Q ]+  =  [p - (g + s / Q) q]+ / s        Q: draft mass not yet removed
#pragma once

#include "math/acceptance.hpp"
#include "math/tree_index.hpp"

namespace foretoken {

enum class Closing : uint8_t {
  bonus,     // nothing behind the last accepted node was rejected: the target's row itself
  recovery,  // what is left of the row after its rejected children
  chosen,    // the walk itself picked it
  argmax,    // the row has no law to draw from
};

// What the rejected children of a node have left of its row.
struct NodeState {
  double prefix = 1.0;   // P: probability with which the path to here is kept (traversal)
  double gain = 0.0;     // dense: p' = [p - gain * q]+ / rest
  double rest = 1.0;     // point: rest = 1 - probability of the removed tokens
  double left = 1.0;     // draft mass of what was not removed; stays 1 when siblings are independent
  int32_t rejected = 0;  // children removed so far: the first `rejected` of the list
};

struct TreeVerdict {
  int32_t node = 0;  // last accepted node; the closing token comes from its row
  Closing closing = Closing::bonus;
  NodeState state;     // of that node
  int64_t token = -1;  // of Closing::chosen
};

template <class Rows>
FORETOKEN_HD inline double left_of_target(Rows& rows, int32_t row, const NodeState& state, int32_t child) {
  const double target = rows.target_prob(row, child);
  if (!rows.dense(row)) {
    return rows.removed(row, state.rejected, child) || !(state.rest > 0.0) ? 0.0 : target / state.rest;
  }
  const double left = target - state.gain * rows.draft_prob(row, child);
  return left > 0.0 && state.rest > 0.0 ? left / state.rest : 0.0;
}

template <class Rows>
FORETOKEN_HD inline double left_of_draft(Rows& rows, int32_t row, const NodeState& state, int32_t child) {
  return rows.dense(row) ? rows.draft_prob(row, child) / state.left : 1.0;
}

// Removes a rejected child. `weight` is what the target's law was multiplied by when it was compared with the
// draft's: 1 for the sibling walk, P for traversal. Returns the mass of [weight * p' - q']+; finding it means
// reading two rows, so where nobody will ask for it (`wanted`) it is left as it was. `replaces_left`: a
// sibling is still to come that was drawn without this one.
template <class Rows>
FORETOKEN_HD_OUTLINE double reject(Rows& rows, int32_t row, NodeState& state, int32_t child, double weight,
                                   bool wanted, bool replaces_left) {
  const double before = state.rest;
  const int32_t elders = state.rejected++;
  if (!rows.dense(row)) {
    if (!rows.removed(row, elders, child)) state.rest -= rows.target_prob(row, child);
    if (state.rest < 0.0) state.rest = 0.0;
  } else if (weight > 0.0 && state.left > 0.0) {
    state.gain += state.rest / (weight * state.left);
    if (wanted) state.rest = rows.residual(row, state.gain);
    if (replaces_left) state.left = rows.left(row, state.rejected);
  } else {
    state.rest = 0.0;
  }
  return before > 0.0 ? weight * state.rest / before : 0.0;
}

template <class Rows>
FORETOKEN_HD inline TreeVerdict stop_at(Rows& rows, int32_t node, const NodeState& state) {
  if (!rows.usable(node)) return {node, Closing::argmax, state};
  return {node, state.rejected > 0 ? Closing::recovery : Closing::bonus, state};
}

// K-SEQ, "SpecTr: fast speculative decoding via optimal transport" (Sun et al. 2023, algorithm 3): the rho in
// [1, k] with 1 - (1 - beta)^k = rho * beta, beta being the mass of min(draft, target / rho). As rho * beta
// is what [target - rho * draft]+ leaves of the target, one residual mass per step is all that is needed.
template <class Rows>
FORETOKEN_HD_OUTLINE double transport_ratio(Rows& rows, int32_t row, int32_t siblings) {
  const auto excess = [&](double rho) {  // >= 0 left of the root, <= 0 right of it
    const double residual = rows.residual(row, rho);
    const double missed = 1.0 - (1.0 - residual) / rho;
    double all_missed = 1.0;
    for (int32_t i = 0; i < siblings; ++i) all_missed *= missed;
    return residual - all_missed;
  };
  double low = 1.0, high = siblings;
  double at_low = excess(low), at_high = excess(high);
  if (!(at_low > 0.0)) return low;
  // False position that halves the value of an end that stays (Illinois). The right end is returned: there
  // the children together never claim more of a token than the target has.
  for (int step = 0; step < 64 && at_high < 0.0 && high - low > 4e-16 * high; ++step) {
    double middle = low + (high - low) * (at_low / (at_low - at_high));
    if (!(middle > low && middle < high)) middle = 0.5 * (low + high);
    const double at_middle = excess(middle);
    if (at_middle > 0.0) {
      low = middle;
      at_low = at_middle;
      at_high *= 0.5;
    } else {
      high = middle;
      at_high = at_middle;
      at_low *= 0.5;
    }
  }
  return high;
}

enum class Siblings : uint8_t { independent, without_replacement, transport };

// From the root down, one sibling after the other. On a chain the token rule (Leviathan et al. 2023, section
// 2.3); on trees recursive rejection sampling, "SpecInfer" (Miao et al. 2024, algorithm 2) for independent
// siblings, "Sequoia" (Chen et al. 2024, algorithm 2) without replacement; where the children are
// deterministic, the walk that accepts a child with its own target probability: optimal there.
template <class Rows, class Decisions>
FORETOKEN_HD_OUTLINE TreeVerdict walk_siblings(Rows& rows, const TreeIndex& tree, Siblings siblings,
                                               Decisions& decide) {
  int32_t node = 0;
  while (true) {
    NodeState state;
    if (!rows.usable(node)) return {node, Closing::argmax, state};
    int32_t child = tree.first_child[node];
    if (siblings == Siblings::transport && child != kNoNode && rows.dense(node)) {
      const double rho = transport_ratio(rows, node, children_of(tree, node));
      for (; child != kNoNode; child = tree.next_sibling[child]) {
        if (decide.token(child, rows.target_prob(node, child), rho * rows.draft_prob(node, child))) break;
        ++state.rejected;
      }
      state.gain = rho;
    } else {
      for (; child != kNoNode; child = tree.next_sibling[child]) {
        const double target = left_of_target(rows, node, state, child);
        if (decide.token(child, target, left_of_draft(rows, node, state, child))) break;
        const bool more = tree.next_sibling[child] != kNoNode;
        reject(rows, node, state, child, 1.0, more, more && siblings == Siblings::without_replacement);
      }
    }
    if (child == kNoNode) return stop_at(rows, node, state);
    node = child;
  }
}

// From the leaves up, in the tree that hangs from `top`'s child `child`; `states[top]` says what `top` has
// lost so far. The last accepted node, or `top` if nothing below was: then its state has lost the child.
template <class Rows, class Decisions>
FORETOKEN_HD_OUTLINE int32_t climb(Rows& rows, const TreeIndex& tree, int32_t top, int32_t child,
                                   bool without_replacement, NodeState* states, int16_t* next,
                                   Decisions& decide) {
  int32_t node = top;
  next[top] = static_cast<int16_t>(child);
  do {
    // A row without a law verifies nothing: its node ends the path, and what comes before does not notice.
    while (next[node] != kNoNode && rows.usable(node)) {
      const int32_t below = next[node];
      NodeState& state = states[node];
      const double target = left_of_target(rows, node, state, below);
      states[below] = NodeState{};
      states[below].prefix = extend_prefix(state.prefix, target, left_of_draft(rows, node, state, below));
      next[below] = tree.first_child[below];
      node = below;
      if (!(states[node].prefix > 0.0)) break;  // no coin keeps it, nor anything below
    }
    if (decide.fraction(node, states[node].prefix)) return node;
    const int32_t parent = tree.parent[node];
    NodeState& state = states[parent];
    next[parent] = tree.next_sibling[node];
    // Behind the last child the parent itself is decided on, by what is left of its row. Often the coin
    // already says how: a prefix of 1 stays 1, and no prefix grows (but for rounding, far below a
    // thousandth).
    const bool last = next[parent] == kNoNode;
    const bool passes = last && (parent == top || state.prefix == 1.0);
    const bool fails = last && !passes && !decide.may_pass(parent, 1.001 * state.prefix);
    const bool wanted = !passes && !fails;
    const double residual =
        reject(rows, parent, state, node, state.prefix, wanted, !last && without_replacement);
    if (fails) state.prefix = 0.0;
    if (wanted && parent != top) state.prefix = block_fraction(state.prefix, residual);
    node = parent;
  } while (node != top);
  return top;
}

// "Traversal verification for speculative tree decoding" (Weng et al. 2025, algorithm 1): from the leaves up.
// On a chain this is block verification (Sun et al. 2024, algorithm 2): all coins count, the longest kept
// prefix wins. `states` has room for the nodes of the tree.
template <class Rows, class Decisions>
FORETOKEN_HD_OUTLINE TreeVerdict walk_traversal(Rows& rows, const TreeIndex& tree, bool without_replacement,
                                                NodeState* states, Decisions& decide) {
  int16_t next[kMaxNodes];
  states[0] = NodeState{};
  for (int32_t child = tree.first_child[0]; child != kNoNode && rows.usable(0);
       child = tree.next_sibling[child]) {
    const int32_t node = climb(rows, tree, 0, child, without_replacement, states, next, decide);
    if (node != 0) return stop_at(rows, node, states[node]);
  }
  return stop_at(rows, 0, states[0]);
}

// Traversal where it cannot lose, recursive rejection elsewhere: from the root down, a child is verified
// together with all that hangs below it where that suits, and by a coin of its own where it does not. Never
// below either rule's walk of the siblings, and equal to traversal on chains. `states` has room for the nodes
// of the tree.
template <class Rows, class Decisions>
FORETOKEN_HD_OUTLINE TreeVerdict walk_mixed(Rows& rows, const TreeIndex& tree, bool without_replacement,
                                            NodeState* states, Decisions& decide) {
  bool suits[kMaxNodes];
  int16_t next[kMaxNodes];
  find_suiting(tree, without_replacement, suits);
  int32_t node = 0;
  while (true) {
    NodeState& state = states[node];
    state = NodeState{};
    if (!rows.usable(node)) return {node, Closing::argmax, state};
    int32_t child = tree.first_child[node];
    for (; child != kNoNode; child = tree.next_sibling[child]) {
      if (suits[child]) {
        const int32_t last = climb(rows, tree, node, child, without_replacement, states, next, decide);
        if (last != node) return stop_at(rows, last, states[last]);
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

// Follows the token that `decide.choose(rows, node)` picks from each row for as long as a child carries it.
// With noise that the drafter shares, "Coupling without communication and drafter-invariant speculative
// decoding" (Daliri et al. 2024, section 4): the text depends on the noise and the target alone.
template <class Rows, class Decisions>
FORETOKEN_HD_OUTLINE TreeVerdict walk_coupled(Rows& rows, const TreeIndex& tree, Decisions& decide) {
  int32_t node = 0;
  while (true) {
    if (!rows.usable(node)) return {node, Closing::argmax, NodeState{}};
    const int64_t token = decide.choose(rows, node);
    int32_t child = tree.first_child[node];
    while (child != kNoNode && rows.token(child) != token) child = tree.next_sibling[child];
    if (child == kNoNode) return {node, Closing::chosen, NodeState{}, token};
    node = child;
  }
}

}  // namespace foretoken

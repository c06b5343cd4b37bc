// Verification with every decision branched instead of drawn: the exact law of a verdict, computed by the
// decisions that ship. For tests over small vocabularies.
#pragma once

#include <vector>

#include "cpu/rows.hpp"
#include "ops/walk.hpp"

namespace foretoken::cpu {

struct TreeCase {                           // one request: T = N + 1 nodes, V tokens
  std::vector<std::vector<double>> target;  // [T][V] logits
  std::vector<std::vector<double>>
      draft;                     // [T][V] logits or probabilities of a node's children; empty: point
  std::vector<int64_t> tokens;   // [N]
  std::vector<int64_t> parents;  // [N]
  bool draft_is_probs = false;
  Processing processing, draft_processing;
  WalkOptions options;
};

struct Branch {
  double probability;           // that the walk ends here
  int32_t node;                 // last accepted node
  std::vector<double> closing;  // [V] probability of each closing token
};

// Nothing if the proposal is not usable.
std::vector<Branch> enumerate_float32(const TreeCase& tree);  // the shipped row arithmetic
std::vector<Branch> enumerate_float64(const TreeCase& tree);  // the same walks over rows in double precision

// All rounds of one tree shape: drafts drawn every way they can be, by laws that depend on the path.
struct JointCase {
  std::vector<std::vector<double>> target;  // [contexts][V] logits; see context_index
  std::vector<std::vector<double>> draft;   // [contexts][V] logits
  std::vector<int64_t> parents;             // [N]
  std::vector<bool> point;  // [T] children of these nodes are the drafter's likeliest, in order
  Processing processing, draft_processing;
  WalkOptions options;
};

struct JointLaw {
  std::vector<double> emitted;  // [V^(D + 1)] of the first D + 1 tokens, decoding plainly behind the round
  double accepted = 0.0;        // expected
};

// The path x_1 .. x_d has index (1 + V + .. + V^(d-1)) + x_1 V^(d-1) + .. + x_d.
int64_t context_index(const std::vector<int64_t>& path, int64_t vocab);

JointLaw joint_law(const JointCase& joint, bool float64);

}  // namespace foretoken::cpu

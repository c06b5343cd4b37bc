// Chain verification with every decision branched instead of drawn: the exact law of a verdict, computed by
// the decisions that ship. For tests over small vocabularies.
#pragma once

#include <vector>

#include "cpu/rows.hpp"
#include "math/chain_walk.hpp"
#include "ops/verify.hpp"

namespace foretoken::cpu {

struct ChainCase {                          // one request: N drafts, V tokens
  std::vector<std::vector<double>> target;  // [N + 1][V] logits
  std::vector<std::vector<double>> draft;   // [N][V] logits, or probabilities; empty row: point law
  std::vector<int64_t> tokens;              // [N]
  bool draft_is_probs = false;
  Processing processing, draft_processing;
  Rule rule = Rule::automatic;
};

struct Branch {
  double probability;  // that the walk ends here
  int32_t accepted;
  std::vector<double> closing;  // [V] probability of each closing token
};

std::vector<Branch> enumerate_float32(const ChainCase& chain);  // the shipped row arithmetic
std::vector<Branch> enumerate_float64(const ChainCase& chain);  // the same walk over rows in double precision

}  // namespace foretoken::cpu

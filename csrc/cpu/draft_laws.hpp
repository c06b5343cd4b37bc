// The law a node's children were drawn from, in whichever form it was declared: a row of logits, a row of
// probabilities, or a short list of ids with their probabilities.
#pragma once

#include <vector>

#include "cpu/processing.hpp"
#include "ops/verify.hpp"

namespace foretoken::cpu {

struct DraftLaw {
  DraftLaw() = default;
  DraftLaw(DraftLaw&&) = default;  // no copies: the row may lie in the storage beside it
  DraftLaw& operator=(DraftLaw&&) = default;

  RowLaw law;                  // weight and mass, as for any row; top is a target id
  Row row;                     // row form: an element for each target id; data == nullptr for the short list
  std::vector<int64_t> ids;    // short list: target ids ...
  std::vector<float> probs;    // ... and probabilities
  std::vector<float> storage;  // of a row that had to be edited, or put in the order of the target's ids

  float element(int64_t token) const;  // what the law's weight is taken of
  double probability(int64_t token) const;
  double share_without(const std::vector<int64_t>& tokens) const;
};

// The law in row `law_row` of the declared tensors, over `vocab` target ids; `path`: tokens drafted to the
// node.
DraftLaw draft_law_at(const VerifyArgs& args, int64_t b, int64_t law_row, const Processing& processing,
                      const LogitEdits& edits, const std::vector<int64_t>& path, int64_t vocab);

// A law given by its probabilities.
DraftLaw law_of_probabilities(const std::vector<double>& probs);

}  // namespace foretoken::cpu

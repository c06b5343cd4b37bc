// One request of a verification, as the walks of math/tree_walk.hpp see it.
#pragma once

#include <vector>

#include "cpu/draft_laws.hpp"
#include "cpu/parallel.hpp"
#include "cpu/residual.hpp"
#include "math/lossy_walk.hpp"

namespace foretoken::cpu {

// Laws are made when they are first asked for: the sibling walk never reads a row it does not reach.
class TreeRows {
 public:
  TreeRows(const VerifyArgs& args, int64_t b, int64_t slot);

  bool history_usable() const { return edits_.usable() && draft_edits_.usable(); }

  // Judged from the proposal alone, before any coin: then dropping it changes no law. Builds the tree; if it
  // returns false the request is to be decoded with no drafts, and the tree is the root alone. `share_row`:
  // make several laws at once, on threads that a single request would leave idle.
  bool take_proposal(int32_t drafts, Rule rule, bool share_row);

  const TreeIndex& tree() const { return tree_; }
  bool greedy() const { return processing_.temperature == 0.0f; }
  bool any_dense() const;

  int64_t token(int32_t node) const { return read_index(args_.draft_tokens, batch_row_, node - 1); }
  Row target_row(int32_t node);
  Row raw_target_row(int32_t node) const;
  int64_t target_row_index(int32_t node) const;
  const RowLaw& target_law(int32_t node);

  // The interface of the walks.
  bool usable(int32_t node) { return target_law(node).usable; }
  bool dense(int32_t node) const { return !ignore_draft_laws_ && law_row(node) >= 0; }
  double target_prob(int32_t node, int32_t child);
  double draft_prob(int32_t node, int32_t child) { return draft_law(node).probability(token(child)); }
  double residual(int32_t node, double gain);
  double left(int32_t node, int32_t count) {
    return draft_law(node).share_without(first_tokens(node, count));
  }
  bool removed(int32_t node, int32_t count, int32_t child) const;
  double entropy(int32_t node) { return cpu::entropy(target_row(node), target_law(node)); }
  double relative_prob(int32_t node, int32_t child);
  bool among_top(int32_t node, int32_t child, int32_t k);

  void ignore_draft_laws() { ignore_draft_laws_ = true; }
  // Of independent paths keeps the one that ranks first, with the law of being first in place of the drafts'.
  void keep_first_path(int32_t num_paths);
  std::vector<double> weights_of_target(int32_t node);
  std::vector<uint64_t> weights_of_draft(int32_t node);
  void set_draft_law(int32_t node, const std::vector<double>& law);

  // The closing token is drawn from this; with `closing` argmax or chosen there is nothing to draw.
  Residual closing_of(const TreeVerdict& verdict);
  Residual whole(int32_t node);

 private:
  bool tree_usable(int32_t drafts);
  bool shape_suits(Rule rule) const;
  bool all_or_none_dense() const;
  bool law_usable(int32_t node);
  void make_laws(int32_t first, bool with_drafts);
  void make_target_law(int32_t node);
  const TileStats* given_stats(int32_t node) const;
  const TensorView& laws() const;
  int64_t law_row(int32_t node) const;
  const DraftLaw& draft_law(int32_t node);
  Residual residual_of(int32_t node, double gain);
  std::vector<int64_t> path_tokens(int32_t node) const;
  std::vector<int64_t> first_tokens(int32_t node, int32_t count) const;

  const VerifyArgs& args_;
  int64_t batch_row_, vocab_;
  Processing processing_, draft_processing_;
  LogitEdits edits_;
  bool shares_edits_;  // one table and one vocabulary: the drafter's rows are edited as the target's
  LogitEdits draft_edits_;
  bool ignore_draft_laws_ = false, share_row_ = false;
  TreeIndex tree_;
  std::vector<RowLaw> target_;
  std::vector<std::vector<uint64_t>> target_tiles_;  // how the mass of each target law is made up
  struct {                                           // the same of the last residual that was asked for
    int32_t node = kNoNode;
    double gain = 0.0;
    std::vector<uint64_t> tiles;
  } residual_;
  std::vector<std::vector<float>> edited_;  // target rows that something edits
  std::vector<DraftLaw> draft_;
  std::vector<uint8_t> target_made_, draft_made_;
};

}  // namespace foretoken::cpu

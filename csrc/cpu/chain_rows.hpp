// One request of a chain verification, as the walk of math/chain_walk.hpp sees it.
#pragma once

#include "cpu/parallel.hpp"
#include "cpu/views.hpp"
#include "math/chain_walk.hpp"
#include "ops/verify.hpp"

namespace foretoken::cpu {

// Laws are made when they are first asked for: the token rule never reads a target row behind a rejection.
class ChainRows {
 public:
  ChainRows(const VerifyArgs& args, int64_t b, int64_t slot)
      : args_(args),
        batch_row_(b),
        processing_(processing_of(args.sampling, slot)),
        draft_processing_(processing_of(args.draft_sampling, slot)),
        vocab_(args.target_logits.shape[args.target_logits.rank - 1]) {}

  bool greedy() const { return processing_.temperature == 0.0f; }

  int64_t token(int32_t node) const { return read_index(args_.draft_tokens, batch_row_, node - 1); }

  Row target_row(int32_t row) const {
    const TensorView& logits = args_.target_logits;
    if (!args_.row_offsets) return row_at(logits, offset_of(logits, batch_row_, row));
    return row_at(logits, offset_of(logits, read_index(args_.row_offsets, batch_row_) + row));
  }

  const RowLaw& target_law(int32_t row) {
    if (!target_made_[row]) {
      target_[row] = law_of_logits(target_row(row), processing_);
      target_made_[row] = true;
    }
    return target_[row];
  }

  bool usable(int32_t row) { return target_law(row).usable; }

  double target_prob(int32_t row) {
    const RowLaw& law = target_law(row);
    const int64_t drafted = token(row + 1);
    if (law.kind == LawKind::point) return drafted == law.top ? 1.0 : 0.0;
    return probability_in(law, target_row(row).at(drafted));
  }

  // A greedy row asks only whether the draft is the argmax: no draft law is read for it.
  bool dense(int32_t node) const { return !greedy() && dense_row(node) >= 0; }

  double draft_prob(int32_t node) {
    if (!dense(node)) return 1.0;
    const RowLaw& law = draft_law(node);
    if (law.kind == LawKind::point) return token(node) == law.top ? 1.0 : 0.0;
    return probability_in(law, draft_row(node).at(token(node)));
  }

  double residual(int32_t node, double prefix) {
    if (!point(node)) return prefix * residual_fraction(residual_of(node, prefix));
    return prefix * (1.0 - target_prob(node - 1));
  }

  Residual residual_of(int32_t node, double prefix) {
    Residual residual = whole(node - 1);
    if (point(node)) {
      residual.excluded = token(node);
      return residual;
    }
    residual.draft = draft_row(node);
    residual.draft_law = &draft_law(node);
    residual.gain = residual_gain(residual.target_law->mass, residual.draft_law->mass, prefix);
    return residual;
  }

  Residual whole(int32_t row) {
    Residual residual;
    residual.target = target_row(row);
    residual.target_law = &target_law(row);
    return residual;
  }

  bool indices_usable(int32_t node) const {
    const TensorView& laws = args_.draft_logits ? args_.draft_logits : args_.draft_probs;
    const bool law_there = !laws || (dense_row(node) >= -1 && dense_row(node) < laws.shape[1]);
    return token(node) >= 0 && token(node) < vocab_ && law_there;
  }

  bool indices_usable_to(int32_t drafts) const {
    for (int32_t node = 1; node <= drafts; ++node) {
      if (!indices_usable(node)) return false;
    }
    return true;
  }

  // Judged from the proposal alone, before any coin: then dropping it changes no law.
  bool proposal_usable(int32_t drafts) {
    if (!indices_usable_to(drafts)) return false;
    for (int32_t node = 1; node <= drafts; ++node) {
      if (dense(node) && !(draft_law(node).usable && draft_prob(node) > 0.0)) return false;
    }
    return true;
  }

  // All laws of the row at once, on threads that one row of the batch would leave idle.
  void make_laws(int32_t drafts) {
    parallel_for(2 * int64_t{drafts} + 1, vocab_, [&](int64_t item) {
      const int32_t index = static_cast<int32_t>(item);
      if (index <= drafts) {
        target_law(index);
      } else if (dense(index - drafts)) {
        draft_law(index - drafts);
      }
    });
  }

  bool any_dense(int32_t drafts) const {
    for (int32_t node = 1; node <= drafts; ++node) {
      if (dense(node)) return true;
    }
    return false;
  }

 private:
  int64_t dense_row(int32_t node) const {
    if (!args_.draft_logits && !args_.draft_probs) return -1;
    return args_.draft_row ? read_index(args_.draft_row, batch_row_, node - 1) : node - 1;
  }

  Row draft_row(int32_t node) const {
    const TensorView& laws = args_.draft_logits ? args_.draft_logits : args_.draft_probs;
    return row_at(laws, offset_of(laws, batch_row_, dense_row(node)));
  }

  const RowLaw& draft_law(int32_t node) {
    if (!draft_made_[node]) {
      draft_[node] = args_.draft_logits ? law_of_logits(draft_row(node), draft_processing_)
                                        : law_of_probs(draft_row(node));
      draft_made_[node] = true;
    }
    return draft_[node];
  }

  bool point(int32_t node) { return !dense(node) || draft_law(node).kind == LawKind::point; }

  const VerifyArgs& args_;
  int64_t batch_row_;
  Processing processing_, draft_processing_;
  int64_t vocab_;
  RowLaw target_[kMaxDrafts + 1], draft_[kMaxDrafts + 1];
  bool target_made_[kMaxDrafts + 1] = {}, draft_made_[kMaxDrafts + 1] = {};
};

// The closing token is drawn from this; for Closing::argmax there is nothing to draw.
inline Residual closing_of(ChainRows& rows, const ChainVerdict& verdict) {
  return verdict.closing == Closing::recovery ? rows.residual_of(verdict.accepted + 1, verdict.prefix)
                                              : rows.whole(verdict.accepted);
}

}  // namespace foretoken::cpu

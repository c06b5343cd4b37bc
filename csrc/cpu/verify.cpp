#include "cpu/verify.hpp"

#include <algorithm>

#include "cpu/parallel.hpp"
#include "cpu/views.hpp"
#include "math/chain_walk.hpp"

namespace foretoken::cpu {

namespace {

// One row of the batch as the walk sees it. Laws are made when they are first asked for: the token rule
// never reads what lies behind a rejection.
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

  // Judged from the proposal alone, before any coin: then dropping it changes no law.
  bool proposal_usable(int32_t drafts) {
    for (int32_t node = 1; node <= drafts; ++node) {
      if (token(node) < 0 || token(node) >= vocab_) return false;
      const TensorView& laws = args_.draft_logits ? args_.draft_logits : args_.draft_probs;
      if (laws && dense_row(node) >= laws.shape[1]) return false;
      if (dense(node) && !(draft_law(node).usable && draft_prob(node) > 0.0)) return false;
    }
    return true;
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

struct PhiloxCoins {
  uint64_t seed, base;

  bool token(int32_t node, double target_prob, double draft_prob) const {
    return accepts_token(random_coin(seed, base, static_cast<uint32_t>(node)), target_prob, draft_prob);
  }
  bool fraction(int32_t node, double h) const {
    return accepts_fraction(random_coin(seed, base, static_cast<uint32_t>(node)), h);
  }
};

// The closing token. A residual can round to nothing where both laws agree to the last bit: then what is
// left to draw from is the target itself (the case has probability below 1e-7).
int64_t close(ChainRows& rows, const ChainVerdict& verdict, uint64_t bits) {
  const int32_t row = verdict.accepted;
  if (verdict.closing == Closing::argmax || rows.greedy()) return rows.target_law(row).top;
  if (verdict.closing == Closing::recovery) {
    const int64_t token = draw(rows.residual_of(row + 1, verdict.prefix), bits);
    if (token >= 0) return token;
  }
  return draw(rows.whole(row), bits);
}

void write_verdict(const VerifyArgs& args, int64_t b, ChainRows* rows, int32_t accepted, int64_t closing,
                   int32_t status) {
  const int32_t emitted = rows != nullptr ? accepted + 1 : 0;
  for (int32_t i = 0; i < static_cast<int32_t>(args.tokens.shape[1]); ++i) {
    const int64_t token = i < accepted ? rows->token(i + 1) : i < emitted ? closing : -1;
    write_index(args.tokens, token, b, i);
    if (!args.logprobs) continue;
    float logprob = 0.0f;
    if (i < emitted) {
      const RowLaw& law = rows->target_law(i);
      logprob = law.usable ? log_probability(rows->target_row(i), law, token) : -__builtin_inff();
    }
    write_float(args.logprobs, logprob, b, i);
  }
  write_index(args.num_emitted, emitted, b);
  write_index(args.num_accepted, accepted, b);
  write_index(args.next_token, closing, b);
  write_index(args.next_lengths, read_index(args.base, b) - 1 + emitted, b);
  write_index(args.status, status, b);
}

void verify_row(const VerifyArgs& args, int64_t b) {
  const int64_t nodes = args.draft_tokens.shape[1];
  const int64_t requested = args.num_drafts ? read_index(args.num_drafts, b) : nodes;
  const int64_t slot = slot_of(args.slots, b, std::min(args.sampling.size, args.draft_sampling.size));
  if (requested == -1 || slot < 0) {
    write_verdict(args, b, nullptr, 0, -1, requested == -1 ? 0 : kBadSlot);
    return;
  }
  ChainRows rows(args, b, slot);
  int32_t status = 0;
  int32_t drafts = static_cast<int32_t>(requested);
  if (requested < 0 || requested > nodes || !rows.proposal_usable(drafts)) {
    drafts = 0;
    status |= kBadDraft;
  }
  const uint64_t seed = args.sampling.seed[slot];
  const uint64_t base = static_cast<uint64_t>(read_index(args.base, b));
  const PhiloxCoins coins{seed, base};
  const bool block = args.rule == Rule::block || (args.rule == Rule::automatic && rows.any_dense(drafts));
  const ChainVerdict verdict =
      block && !rows.greedy() ? walk_block(rows, drafts, coins) : walk_token(rows, drafts, coins);
  if (verdict.closing == Closing::argmax) status |= kLawLost;
  const uint64_t bits = random_bits(seed, base, Purpose::close, static_cast<uint32_t>(verdict.accepted));
  write_verdict(args, b, &rows, verdict.accepted, close(rows, verdict, bits), status);
}

}  // namespace

void verify(const VerifyArgs& args) {
  const TensorView& logits = args.target_logits;
  const int64_t per_row = logits.shape[logits.rank - 1] * (args.draft_tokens.shape[1] + 1);
  parallel_rows(args.draft_tokens.shape[0], per_row, [&](int64_t b) { verify_row(args, b); });
}

}  // namespace foretoken::cpu

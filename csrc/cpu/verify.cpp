#include "cpu/verify.hpp"

#include <algorithm>

#include "cpu/gumbel.hpp"
#include "cpu/parallel.hpp"
#include "cpu/tree_rows.hpp"
#include "cpu/verdict.hpp"
#include "ops/walk.hpp"

namespace foretoken::cpu {

namespace {

struct PhiloxCoins {
  uint64_t seed, base;

  bool token(int32_t node, double target_prob, double draft_prob) const {
    return accepts_token(random_coin(seed, base, static_cast<uint32_t>(node)), target_prob, draft_prob);
  }
  bool fraction(int32_t node, double h) const {
    return accepts_fraction(random_coin(seed, base, static_cast<uint32_t>(node)), h);
  }
  bool may_pass(int32_t node, double bound) const { return fraction(node, bound); }
  int64_t choose(TreeRows& rows, int32_t node) const {
    const uint64_t position = base + static_cast<uint64_t>(rows.tree().depth[node]);
    return gumbel_draw(rows.target_row(node), rows.target_law(node), seed, position, TensorView{});
  }
};

// The closing token. A residual can round to nothing where both laws agree to the last bit: then what is
// left to draw from is the target itself (the case has probability below 1e-7).
int64_t close(TreeRows& rows, const TreeVerdict& verdict, const PhiloxCoins& coins, Rule rule) {
  if (verdict.closing == Closing::chosen) return verdict.token;
  if (verdict.closing == Closing::argmax || rows.greedy()) return rows.target_law(verdict.node).top;
  if (rule == Rule::coupled) return coins.choose(rows, verdict.node);
  const uint64_t bits =
      random_bits(coins.seed, coins.base, Purpose::close, static_cast<uint32_t>(verdict.node));
  const int64_t token = draw(rows.closing_of(verdict), bits);
  return token >= 0 ? token : draw(rows.whole(verdict.node), bits);
}

// Rows of target logits that belong to row b; 0 if its offsets leave the tensor.
int64_t target_rows(const VerifyArgs& args, int64_t b) {
  if (!args.row_offsets) return args.target_logits.shape[1];
  const int64_t first = read_index(args.row_offsets, b), last = read_index(args.row_offsets, b + 1);
  return first >= 0 && last >= first && last <= args.target_logits.shape[0] ? last - first : 0;
}

// The rule of a slot; kRules if its code is none.
int rule_of(const VerifyArgs& args, int64_t slot) {
  if (!args.rules) return static_cast<int>(args.rule);
  if (slot >= args.rules.shape[0]) return kRules;
  const uint8_t code = static_cast<const uint8_t*>(args.rules.data)[offset_of(args.rules, slot)];
  return code < kRules ? code : kRules;
}

void verify_row(const VerifyArgs& args, int64_t b, bool share_row) {
  const int64_t nodes = args.draft_tokens.shape[1];
  const int64_t requested = args.num_drafts ? read_index(args.num_drafts, b) : nodes;
  const int64_t slot = slot_of(args.slots, b, std::min(args.sampling.size, args.draft_sampling.size));
  const int64_t rows_there = target_rows(args, b);
  const int code = slot < 0 ? kRules : rule_of(args, slot);
  if (requested == -1 || code == kRules || rows_there < 1) {
    write_no_verdict(args, b, requested == -1 ? 0 : kBadRow);
    return;
  }
  TreeRows rows(args, b, slot);
  if (!rows.history_usable()) {
    write_no_verdict(args, b, kBadRow);
    return;
  }
  const WalkOptions options{static_cast<Rule>(code), args.draw, args.num_paths, args.tolerance};
  int32_t status = 0;
  const bool count_usable = requested >= 0 && requested <= nodes && requested < rows_there;
  if (!count_usable || !rows.take_proposal(static_cast<int32_t>(requested), options.rule, share_row)) {
    status |= kBadDraft;
  }
  PhiloxCoins coins{args.sampling.seed[slot], static_cast<uint64_t>(read_index(args.base, b))};
  NodeState states[kMaxNodes];
  const TreeVerdict verdict = walk(rows, rows.tree(), options, states, coins);
  if (verdict.closing == Closing::argmax) status |= kLawLost;
  // Nothing to draw at all is left only of a row whose given statistics are those of another.
  const int64_t closing = std::max<int64_t>(close(rows, verdict, coins, options.rule), 0);
  write_verdict(args, b, rows, verdict.node, closing, status);
}

}  // namespace

void verify(const VerifyArgs& args) {
  const TensorView& logits = args.target_logits;
  const int64_t batch = args.draft_tokens.shape[0], rows = args.draft_tokens.shape[1] + 1;
  const int64_t vocab = logits.shape[logits.rank - 1];
  // With fewer requests than threads the rows of each request are shared out instead.
  if (batch < threads_for(2 * rows, vocab)) {
    for (int64_t b = 0; b < batch; ++b) verify_row(args, b, true);
    return;
  }
  parallel_for(batch, rows * vocab, [&](int64_t b) { verify_row(args, b, false); });
}

}  // namespace foretoken::cpu

#include "cpu/verify.hpp"

#include <algorithm>

#include "cpu/chain_rows.hpp"
#include "cpu/parallel.hpp"

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
};

// The closing token. A residual can round to nothing where both laws agree to the last bit: then what is
// left to draw from is the target itself (the case has probability below 1e-7).
int64_t close(ChainRows& rows, const ChainVerdict& verdict, uint64_t bits) {
  const int32_t row = verdict.accepted;
  if (verdict.closing == Closing::argmax || rows.greedy()) return rows.target_law(row).top;
  const int64_t token = draw(closing_of(rows, verdict), bits);
  return token >= 0 ? token : draw(rows.whole(row), bits);
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

// Rows of target logits that belong to row b; 0 if its offsets leave the tensor.
int64_t target_rows(const VerifyArgs& args, int64_t b) {
  if (!args.row_offsets) return args.target_logits.shape[1];
  const int64_t first = read_index(args.row_offsets, b), last = read_index(args.row_offsets, b + 1);
  return first >= 0 && last >= first && last <= args.target_logits.shape[0] ? last - first : 0;
}

void verify_row(const VerifyArgs& args, int64_t b, bool share_row) {
  const int64_t nodes = args.draft_tokens.shape[1];
  const int64_t requested = args.num_drafts ? read_index(args.num_drafts, b) : nodes;
  const int64_t slot = slot_of(args.slots, b, std::min(args.sampling.size, args.draft_sampling.size));
  const int64_t rows_there = target_rows(args, b);
  if (requested == -1 || slot < 0 || rows_there < 1) {
    write_verdict(args, b, nullptr, 0, -1, requested == -1 ? 0 : kBadRow);
    return;
  }
  ChainRows rows(args, b, slot);
  int32_t status = 0;
  int32_t drafts = static_cast<int32_t>(requested);
  const bool count_usable = requested >= 0 && requested <= nodes && requested < rows_there;
  if (share_row && count_usable && rows.indices_usable_to(drafts)) rows.make_laws(drafts);
  if (!count_usable || !rows.proposal_usable(drafts)) {
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

// The walk down a chain: which drafts stay, and from what the closing token is drawn. Written once over two
// small interfaces, so that the shipped coins and the tests' enumerated ones run the same decisions:
//
//   Rows       bool usable(row); double target_prob(row); double draft_prob(node);
//              double residual(node, prefix)  mass of [prefix * target(row node - 1) - draft(node)]+
//              (target_prob(row) is the probability that row gives to the draft behind it, node row + 1)
//   Decisions  bool token(node, target_prob, draft_prob); bool fraction(node, h)
#pragma once

#include "math/acceptance.hpp"

namespace foretoken {

constexpr int kMaxDrafts = 255;

enum class Closing : uint8_t {
  bonus,     // everything accepted: the target's row itself
  recovery,  // [prefix * target - draft]+
  argmax,    // the row has no law to draw from
};

struct ChainVerdict {
  int32_t accepted = 0;  // drafts kept; the closing token comes from row `accepted`
  Closing closing = Closing::bonus;
  double prefix = 1.0;  // P of the block rule at the stop; 1 for the token rule
};

template <class Rows, class Decisions>
ChainVerdict walk_token(Rows& rows, int32_t drafts, Decisions& decide) {
  for (int32_t node = 1; node <= drafts; ++node) {
    const int32_t row = node - 1;
    if (!rows.usable(row)) return {row, Closing::argmax, 1.0};
    if (!decide.token(node, rows.target_prob(row), rows.draft_prob(node)))
      return {row, Closing::recovery, 1.0};
  }
  return {drafts, rows.usable(drafts) ? Closing::bonus : Closing::argmax, 1.0};
}

// All coins count and the largest i with u_i < h_i wins, so the walk starts at the end: the residual masses
// of shorter prefixes are only needed where every longer one has failed.
template <class Rows, class Decisions>
ChainVerdict walk_block(Rows& rows, int32_t drafts, Decisions& decide) {
  double prefix[kMaxDrafts + 1];
  prefix[0] = 1.0;
  int32_t length = 0;
  // A row without a law ends the block before it: what comes behind cannot be verified, and the law of what
  // comes before must not depend on it.
  while (length < drafts && rows.usable(length)) {
    prefix[length + 1] = extend_prefix(prefix[length], rows.target_prob(length), rows.draft_prob(length + 1));
    ++length;
  }
  for (int32_t kept = length; kept >= 1; --kept) {
    const bool last = kept == length;
    const double h =
        last ? prefix[kept] : block_fraction(prefix[kept], rows.residual(kept + 1, prefix[kept]));
    if (!decide.fraction(kept, h)) continue;
    if (!last) return {kept, Closing::recovery, prefix[kept]};
    return {kept, rows.usable(kept) ? Closing::bonus : Closing::argmax, 1.0};
  }
  if (!rows.usable(0)) return {0, Closing::argmax, 1.0};
  return {0, length == 0 ? Closing::bonus : Closing::recovery, 1.0};
}

}  // namespace foretoken

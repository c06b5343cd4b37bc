// How many drafts the next round should have, by what the last rounds accepted: integers throughout.
#pragma once

#include "math/portability.hpp"

namespace foretoken {

constexpr int32_t kMostCost = 1 << 20;
constexpr int kRateBits = 16;

// Of one text: trials of drafts and their successes, the latest counting most. A round tries its accepted
// drafts and the first that is refused.
struct AcceptanceRate {
  static constexpr int32_t kOne = 1 << 8;
  static constexpr int kForget = 4;  // each round takes a sixteenth of what is known
  // What four trials, three of them successes, would have left: a beginning.
  static constexpr int32_t kTrialsBefore = 4 * kOne, kSuccessesBefore = 3 * kOne;

  int32_t trials, successes;

  FORETOKEN_HD void note(int32_t drafted, int32_t accepted) {
    if (drafted <= 0) return;
    const int32_t kept = accepted < 0 ? 0 : accepted < drafted ? accepted : drafted;
    trials += (kept + (kept < drafted ? 1 : 0)) * kOne - (trials >> kForget);
    successes += kept * kOne - (successes >> kForget);
  }

  // In 2^-kRateBits.
  FORETOKEN_HD int64_t rate() const {
    return (static_cast<int64_t>(successes + kSuccessesBefore) << kRateBits) / (trials + kTrialsBefore);
  }
};

// Tokens that rounds of ever more drafts are expected to give, in 2^-kRateBits.
class ExpectedTokens {
 public:
  FORETOKEN_HD explicit ExpectedTokens(int64_t rate) : rate_(rate) {}

  // With so many drafts, no fewer than in the call before.
  FORETOKEN_HD int64_t with(int64_t drafts) {
    for (; drafts_ < drafts; ++drafts_) {
      power_ = power_ * rate_ >> kRateBits;
      tokens_ += power_;
    }
    return tokens_;
  }

 private:
  int64_t rate_, drafts_ = 0;
  int64_t power_ = int64_t{1} << kRateBits, tokens_ = int64_t{1} << kRateBits;
};

}  // namespace foretoken

// Which of n independent paths ranks first, and the law of being first: "Greedy multi-path block verification
// for faster decoding in speculative sampling" (2026, arXiv 2602.16961). At every node the tokens are ranked
// by target / draft, a ranking no draw has a say in; a path then is an interval of [0, 1), nested token by
// token like an arithmetic code, and the largest of n independent points of [0, 1) lies in [low, high) with
// probability high^n - low^n. So the kept path has the law
//   first(x | prefix) = (high(x)^n - low(x)^n) / (high^n - low^n),
// with which block verification takes it for a single draft.
#pragma once

#include "math/portability.hpp"

namespace foretoken {

struct PathInterval {
  double low = 0.0, width = 1.0;
  int32_t paths = 1;

  // (high^n - low^n) / (high - low), without the cancellation.
  FORETOKEN_HD double slope() const {
    const double high = low + width;
    double sum = 0.0, power = 1.0;
    for (int32_t i = 0; i < paths; ++i) {
      sum = sum * low + power;
      power *= high;
    }
    return sum;
  }

  // That of a token: shares of the draft's mass, its own and what ranks before it.
  FORETOKEN_HD PathInterval narrowed(double before, double share) const {
    return {low + width * before, width * share, paths};
  }

  // Probability that the token comes next in the path that ranks first; `whole` is slope().
  FORETOKEN_HD double first(double before, double share, double whole) const {
    return share * narrowed(before, share).slope() / whole;
  }
};

}  // namespace foretoken

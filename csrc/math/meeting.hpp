// How blocks of a launch agree whether they go on together, where nobody knows whether all of them will run
// at a time: one that has not begun may be kept from it by those that wait. They meet in a word, which is
// zero before and after.
#pragma once

#include "math/portability.hpp"

namespace foretoken {

enum class Part : int32_t {
  leaves,  // the last to come goes on alone
  alone,
  leads,  // with all others; the last to come
  helps,
};

// Of the word: how many have come; whether nobody waits; how many know how it ended, above.
constexpr uint32_t kHaveCome = 0x3FFu, kNobodyWaits = 0x8000u, kOneKnows = 0x10000u;

// `word.add(n)` and `word.swap(expected, desired)` return what was there before; these and `word.read()` are
// in order with all that the others did before theirs.
template <class Word>
FORETOKEN_INLINE Part meet(Word& word, uint32_t blocks) {
  uint32_t found = word.add(1) + 1;
  const bool is_last = (found & kHaveCome) == blocks;
  while ((found & kHaveCome) != blocks && (found & kNobodyWaits) == 0) {
    if (word.is_patient()) {
      found = word.read();
      continue;
    }
    // Only while somebody is missing, so that all agree, and who is missing knows when it comes.
    const uint32_t before = word.swap(found, found | kNobodyWaits);
    found = before == found ? found | kNobodyWaits : before;
  }
  if ((found & kNobodyWaits) != 0) return is_last ? Part::alone : Part::leaves;
  return is_last ? Part::leads : Part::helps;
}

// Once by each that has met. `word.count(n)` is add() in no order with anything.
template <class Word>
FORETOKEN_INLINE void leave_meeting(Word& word, uint32_t blocks) {
  if (word.count(kOneKnows) / kOneKnows == blocks - 1) word.clear();
}

}  // namespace foretoken

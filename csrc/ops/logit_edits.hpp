// What constraints do to a logit, element by element: one arithmetic for every processor.
#pragma once

#include "ops/sampling.hpp"

namespace foretoken {

FORETOKEN_INLINE int64_t index_at(const TensorView& view, int64_t i, int64_t j = 0) {
  const int64_t offset = i * view.strides[0] + (view.rank > 1 ? j * view.strides[1] : 0);
  return view.dtype == DType::int64 ? static_cast<const int64_t*>(view.data)[offset]
                                    : static_cast<const int32_t*>(view.data)[offset];
}

// How much of a slot's text is prompt; -1: the history does not reach `base`.
FORETOKEN_INLINE int64_t prompt_within(const HistoryView& history, int64_t slot, int64_t base) {
  if (slot >= history.tokens.shape[0] || base < 0 || base > history.tokens.shape[1]) return -1;
  const int64_t prompt = index_at(history.prompt_lengths, slot);
  return prompt >= 0 && prompt <= base ? prompt : -1;
}

// The logit of a token in prompt or output, which was generated so often.
FORETOKEN_INLINE float penalised(const Constraints& rule, float logit, int32_t generated) {
  if (rule.repetition != 1.0f) logit = logit > 0.0f ? logit / rule.repetition : logit * rule.repetition;
  if (generated > 0) {
    logit -= rule.frequency * static_cast<float>(generated);
    logit -= rule.presence;
  }
  return logit;
}

// Whether a text of `length` tokens ends in all but the last token of the bad word at [first, end).
// before(back): a token of the text; 1 is the last one.
template <class Before>
FORETOKEN_HD inline bool ends_in_word(const Constraints& rule, int32_t first, int32_t end, int64_t length,
                                      const Before& before) {
  const int32_t preceding = end - first - 1;
  if (preceding > length) return false;
  for (int32_t i = 0; i < preceding; ++i) {
    if (before(preceding - i) != rule.bad_words[first + i]) return false;
  }
  return true;
}

}  // namespace foretoken

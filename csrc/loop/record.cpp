#include "loop/record.hpp"

#include <algorithm>

#include "ops/sampling.hpp"

namespace foretoken::loop {
namespace {

void add_round(Counters& sum, const Round& round, int64_t emitted, int64_t sign) {
  sum.rounds += sign;
  sum.drafts += round.drafted > 0 ? sign : 0;
  sum.draft_tokens += sign * round.drafted;
  sum.accepted_tokens += sign * round.accepted;
  sum.emitted_tokens += sign * emitted;
  sum.rollbacks += round.drafted > round.accepted ? sign : 0;
  sum.moved_rows += sign * round.moved;
  sum.bad_draft_rounds += (round.status & kBadDraft) != 0 ? sign : 0;
  sum.law_lost_rounds += (round.status & kLawLost) != 0 ? sign : 0;
  sum.rounds_by_drafts[round.drafted] += sign;
  for (int32_t i = 0; i < round.accepted; ++i) sum.accepted_per_pos[i] += sign;
}

bool holds(const std::vector<int64_t>& ids, int64_t token) {
  return std::find(ids.begin(), ids.end(), token) != ids.end();
}

template <typename T>
void make_room(std::vector<T>& items, size_t more) {
  if (items.capacity() - items.size() < more) items.reserve(std::max(items.size() + more, 2 * items.size()));
}

}  // namespace

void Record::reserve_round(int64_t tokens_of_round, bool keep_logprobs) {
  make_room(tokens, tokens_of_round);
  make_room(kinds, tokens_of_round);
  if (keep_logprobs) make_room(logprobs, tokens_of_round);
  make_room(rounds, 1);
}

Finish Record::end_with(int64_t token) const {
  if (holds(limits.eos_ids, token)) return Finish::eos;
  if (holds(limits.stop_ids, token)) return Finish::stop;
  if (generated() >= limits.max_new_tokens) return Finish::length;
  return Finish::none;
}

Finish Record::emit(const Emission& emission, Counters& total) {
  const int64_t first = generated();
  Finish end = Finish::none;
  int64_t emitted = 0;
  while (emitted < emission.count && end == Finish::none) {
    const int64_t token = emission.tokens[emitted];
    tokens.push_back(token);
    const bool draft = emitted < emission.accepted;
    kinds.push_back(draft ? Kind::accepted : emission.bonus ? Kind::bonus : Kind::recovery);
    if (emission.logprobs != nullptr) logprobs.push_back(emission.logprobs[emitted]);
    ++emitted;
    end = end_with(token);
  }
  const int64_t kept = std::min<int64_t>(emission.accepted, emitted);
  const Round round{first, emission.drafted, static_cast<int32_t>(kept), emission.moved, emission.status};
  rounds.push_back(round);
  add_round(counters, round, emitted, 1);
  add_round(total, round, emitted, 1);
  status |= emission.status;
  event_drafts += emission.drafted;
  return end;
}

void Record::withdraw(int64_t n, Counters& total) {
  while (!rounds.empty() && generated() > n) {
    Round& round = rounds.back();
    const int64_t emitted = generated() - round.first;
    add_round(counters, round, emitted, -1);
    add_round(total, round, emitted, -1);
    const int64_t keep = std::max<int64_t>(n - round.first, 0);
    if (keep > 0) {
      round.accepted = static_cast<int32_t>(std::min<int64_t>(round.accepted, keep));
      add_round(counters, round, keep, 1);
      add_round(total, round, keep, 1);
    }
    const int64_t left = round.first + keep;
    if (keep == 0) rounds.pop_back();
    tokens.resize(prompt_length + left);
    kinds.resize(left);
    if (!logprobs.empty()) logprobs.resize(left);
  }
  if (delivered > generated()) {
    retracted += delivered - generated();
    delivered = generated();
  }
}

}  // namespace foretoken::loop

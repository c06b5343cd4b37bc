#include "cpu/commit.hpp"

#include <algorithm>
#include <cstring>

#include "cpu/views.hpp"
#include "ops/sampling.hpp"

namespace foretoken::cpu {

namespace {

struct Outcome {
  int64_t emitted = 0, kept = 0;
  int32_t drafted = 0, accepted = 0, status = 0, moved = 0;
  bool bonus = false;
  CommitEnd end = CommitEnd::none;
};

bool holds(const TensorView& ids, int64_t slot, int64_t token) {
  for (int64_t i = 0; i < ids.shape[1]; ++i) {
    if (read_index(ids, slot, i) == token) return token >= 0;
  }
  return false;
}

CommitEnd end_with(const CommitArgs& args, int64_t slot, int64_t token, bool full) {
  if (holds(args.eos_ids, slot, token)) return CommitEnd::eos;
  if (holds(args.stop_ids, slot, token)) return CommitEnd::stop;
  return full ? CommitEnd::length : CommitEnd::none;
}

// How the accepted path lies among its drafts. Numbers that make no sense are cut to what there is.
void look_at_path(const CommitArgs& args, int64_t b, Outcome& outcome) {
  if (!args.parents) {
    outcome.bonus = outcome.accepted == outcome.drafted;
    return;
  }
  const int64_t accepted = std::clamp<int64_t>(outcome.accepted, 0, args.path.shape[1]);
  const int64_t drafted = std::clamp<int64_t>(outcome.drafted, 0, args.parents.shape[1]);
  for (int64_t i = 0; i < accepted; ++i) outcome.moved += read_index(args.path, b, i) != i + 1;
  const int64_t last = accepted == 0 ? 0 : read_index(args.path, b, accepted - 1);
  outcome.bonus = true;
  for (int64_t i = 0; i < drafted; ++i) outcome.bonus &= read_index(args.parents, b, i) != last;
}

void add(const TensorView& sums, int64_t value, int64_t slot, int64_t column) {
  static_cast<int64_t*>(sums.data)[offset_of(sums, slot, column)] += value;
}

void count(const CommitArgs& args, int64_t slot, const Outcome& outcome) {
  const int32_t flags[] = {kBadDraft, kLawLost, kBadRow};
  for (int i = 0; i < 3; ++i) {
    if (outcome.status & flags[i]) add(args.sums, 1, slot, kCountBadDrafts + i);
  }
  if (outcome.emitted == 0) return;
  const int64_t accepted = std::clamp<int64_t>(outcome.accepted, 0, outcome.kept);
  add_round(outcome, accepted,
            [&](CommitCounter column, int64_t amount) { add(args.sums, amount, slot, column); });
  for (int64_t i = 0; i < std::min(accepted, args.by_position.shape[1]); ++i) {
    add(args.by_position, 1, slot, i);
  }
  if (outcome.drafted >= 0 && outcome.drafted < args.by_drafts.shape[1]) {
    add(args.by_drafts, 1, slot, outcome.drafted);
  }
}

Outcome append(const CommitArgs& args, int64_t b, int64_t slot, int64_t base) {
  Outcome outcome;
  outcome.emitted = std::min(read_index(args.num_emitted, b), args.tokens.shape[1]);
  outcome.drafted = static_cast<int32_t>(read_index(args.num_drafts, b));
  outcome.accepted = static_cast<int32_t>(read_index(args.num_accepted, b));
  outcome.status = static_cast<int32_t>(read_index(args.status, b));
  const int64_t limit = std::min(read_index(args.limits, slot), args.text.shape[1]);
  const int64_t room = limit > base ? limit - base : 0;
  if (room == 0) outcome.end = CommitEnd::length;
  while (outcome.kept < outcome.emitted && outcome.end == CommitEnd::none) {
    const int64_t token = read_index(args.tokens, b, outcome.kept);
    write_index(args.text, token, slot, base + outcome.kept);
    ++outcome.kept;
    outcome.end = end_with(args, slot, token, outcome.kept >= room);
  }
  const int64_t next = base + outcome.kept;
  int64_t drafts = -1;
  if (outcome.end == CommitEnd::none) {
    drafts = std::max<int64_t>(std::min(read_index(args.budgets, slot), limit - next - 1), 0);
  }
  write_index(args.base, next, slot);
  write_index(args.ends, static_cast<int64_t>(outcome.end), slot);
  write_index(args.next_drafts, drafts, slot);
  look_at_path(args, b, outcome);
  return outcome;
}

Outcome settle(const CommitArgs& args, int64_t b) {
  Outcome idle;
  const int64_t slot = slot_of(args.slots, b, args.base.shape[0]);
  const int64_t base = slot < 0 ? 0 : read_index(args.base, slot);
  if (base < 1 || base > args.text.shape[1]) {
    idle.status = kBadRow;
    return idle;
  }
  const bool ended = read_index(args.ends, slot) != 0 || read_index(args.next_drafts, slot) < 0;
  Outcome outcome;
  if (!ended && read_index(args.num_emitted, b) > 0) {
    outcome = append(args, b, slot, base);
  } else {
    outcome.status = static_cast<int32_t>(read_index(args.status, b));
    outcome.end = static_cast<CommitEnd>(read_index(args.ends, slot));
  }
  if (args.sums) count(args, slot, outcome);
  return outcome;
}

void write_record(const CommitArgs& args, int64_t b, const Outcome& outcome) {
  int32_t* const posted = outbox_of(args);
  const int64_t width = record_width(args.tokens.shape[1], static_cast<bool>(args.logprobs));
  const auto field = [&](int64_t column, int64_t value) {
    if (args.record) write_index(args.record, value, b, column);
    if (posted != nullptr) posted[b * width + column] = static_cast<int32_t>(value);
  };
  field(kRecordDrafted, outcome.drafted);
  field(kRecordEmitted, outcome.emitted);
  field(kRecordAccepted, outcome.accepted);
  field(kRecordKept, outcome.kept);
  field(kRecordStatus, outcome.status);
  field(kRecordEnd, static_cast<int64_t>(outcome.end));
  field(kRecordBonus, outcome.bonus);
  field(kRecordMoved, outcome.moved);
  const int64_t columns = args.tokens.shape[1];
  for (int64_t i = 0; i < columns; ++i) {
    const bool emitted = i < outcome.emitted;
    field(kRecordFields + i, emitted ? read_index(args.tokens, b, i) : -1);
    if (!args.logprobs) continue;
    int32_t bits = 0;
    if (emitted)
      std::memcpy(&bits, static_cast<float*>(args.logprobs.data) + offset_of(args.logprobs, b, i), 4);
    field(kRecordFields + columns + i, bits);
  }
}

}  // namespace

void commit(const CommitArgs& args) {
  for (int64_t b = 0; b < args.tokens.shape[0]; ++b) {
    const Outcome outcome = settle(args, b);
    if (args.record || args.outbox != nullptr) write_record(args, b, outcome);
  }
  if (args.outbox != nullptr) {
    args.outbox_state[kOutboxWritten] =
        static_cast<int32_t>(static_cast<uint32_t>(args.outbox_state[kOutboxWritten]) + 1);
  }
}

}  // namespace foretoken::cpu

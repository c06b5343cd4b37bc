// Contract of the commit: what a round's verdict changes in the state of its requests.
#pragma once

#include "math/portability.hpp"
#include "ops/tensor_view.hpp"

namespace foretoken {

enum class CommitEnd : int32_t { none, eos, stop, length };  // what ended a request, as in its events

// Columns of the record in front of the tokens.
enum CommitField : int32_t {
  kRecordDrafted,   // drafts that were checked
  kRecordEmitted,   // tokens of the verdict; 0: the row was padded or its request had ended before
  kRecordAccepted,  //
  kRecordKept,      // of the emitted tokens, those up to the first that ended the request
  kRecordStatus,    // StatusBit
  kRecordEnd,       // CommitEnd
  kRecordBonus,     // 1: the closing token came behind a draft that had no children
  kRecordMoved,     // accepted nodes whose cache rows have to move
  kRecordFields,
};

// Columns of the sums over rounds. A round is one verdict of one request that emitted something.
enum CommitCounter : int32_t {
  kCountRounds,
  kCountDrafts,       // rounds that checked at least one draft
  kCountDraftTokens,  // drafts checked
  kCountAccepted,     // of them, accepted and kept
  kCountEmitted,      // tokens kept
  kCountRollbacks,    // rounds that dropped at least one draft
  kCountMoved,
  kCountBadDrafts,  // rows with this bit in their status, and so on
  kCountLawLost,
  kCountBadRows,
  kCommitCounters,
};

// What is kept beside an outbox, zeros at first.
enum OutboxField : int32_t { kOutboxWritten, kOutboxArrived, kOutboxFields };  // records, modulo 2^32; blocks

constexpr int64_t record_width(int64_t columns, bool logprobs) {
  return kRecordFields + (logprobs ? 2 : 1) * columns;
}

struct CommitArgs {         // B rows of C = D + 1 tokens, N drafts, S slots, L tokens of text
  TensorView tokens;        // [B, C] int32 | int64, as verification emitted them
  TensorView num_emitted;   // [B] int32; 0: a padded row, nothing of its slot is touched
  TensorView num_accepted;  // [B] int32
  TensorView status;        // [B] int32
  TensorView logprobs;      // [B, C] float32, may be null
  TensorView num_drafts;    // [B] int32: drafts that the round checked
  TensorView path;          // [B, D] int32, accepted nodes; read beside parents alone
  TensorView parents;       // [B, N] int32 | int64, of node i + 1; null: chains
  TensorView slots;         // [B] int32, no slot twice; null: row b is slot b
  TensorView limits;        // [S] int64: the text's length when max_new_tokens are there
  TensorView budgets;       // [S] int32: the most drafts of a round
  TensorView eos_ids;       // [S, n] int32, -1 = none
  TensorView stop_ids;      // [S, m] int32, -1 = none
  TensorView text;          // [S, L] int32 in, out: prompt and output
  TensorView base;          // [S] int64 in, out: tokens of the text
  TensorView next_drafts;   // [S] int32 in, out: drafts that the next round may check; -1: nobody is decoding
  TensorView ends;          // [S] int32 in, out: CommitEnd
  TensorView record;        // [B, F + C] int32 out, [B, F + 2 C] with logprobs (their bits); may be null
  int32_t* outbox = nullptr;  // [places, size] out: records [B, W] for a host, in mapped memory; may be null
  int64_t outbox_places = 0, outbox_size = 0;  // a power of two; at least B W
  int32_t* outbox_state = nullptr;             // [kOutboxFields] in, out; beside an outbox
  TensorView sums;                             // [S, kCommitCounters] int64 in, out; null: nothing is counted
  TensorView by_position;  // [S, P] int64 in, out: rounds that kept draft i of a path; beside sums
  TensorView by_drafts;    // [S, M] int64 in, out: rounds that checked so many drafts; beside sums
};

// What a round adds to the sums of its slot, but for flags, by `add(column, amount)`. `accepted`: of its
// accepted drafts, those that were kept.
template <class Outcome, class Add>
FORETOKEN_HD inline void add_round(const Outcome& outcome, int64_t accepted, const Add& add) {
  add(kCountRounds, 1);
  add(kCountDrafts, outcome.drafted > 0 ? 1 : 0);
  add(kCountDraftTokens, outcome.drafted);
  add(kCountAccepted, accepted);
  add(kCountEmitted, outcome.kept);
  add(kCountRollbacks, outcome.drafted > accepted ? 1 : 0);
  add(kCountMoved, outcome.moved);
}

// Where the records of this round go; null: there is no outbox.
FORETOKEN_HD inline int32_t* outbox_of(const CommitArgs& args) {
  if (args.outbox == nullptr) return nullptr;
  const int64_t written = static_cast<uint32_t>(args.outbox_state[kOutboxWritten]);
  return args.outbox + written % args.outbox_places * args.outbox_size;
}

}  // namespace foretoken

// One request: what was asked, what has been emitted, and how each token came about.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace foretoken::loop {

enum class Phase : uint8_t { waiting, prefill, decode, finished };
enum class Finish : uint8_t { none, eos, stop, length, cancelled };
enum class Kind : uint8_t { accepted, recovery, bonus };

struct Limits {
  int64_t max_new_tokens = 0;
  int64_t min_new_tokens = 0;
  int64_t num_drafts = 0;  // 0: speculation is off
  std::vector<int64_t> eos_ids;
  std::vector<int64_t> stop_ids;
};

// Sums over rounds; a round is one verdict of one request.
struct Counters {
  explicit Counters(int64_t num_drafts = 0, int64_t num_nodes = 0)
      : accepted_per_pos(num_drafts), rounds_by_drafts(std::max(num_drafts, num_nodes) + 1) {}

  int64_t rounds = 0;
  int64_t drafts = 0;  // rounds that checked at least one draft
  int64_t draft_tokens = 0;
  int64_t accepted_tokens = 0;
  int64_t emitted_tokens = 0;  // accepted and closing ones
  int64_t rollbacks = 0;       // rounds that dropped at least one draft
  int64_t moved_rows = 0;      // accepted nodes whose cache rows had to move
  int64_t bad_draft_rounds = 0;
  int64_t law_lost_rounds = 0;
  std::vector<int64_t> accepted_per_pos;
  std::vector<int64_t> rounds_by_drafts;  // entry i: rounds that checked i drafts
};

struct Round {
  int64_t first;  // index of its first generated token
  int32_t drafted;
  int32_t accepted;  // how many of the accepted drafts were emitted (an end may cut the run)
  int32_t moved;     // accepted nodes whose cache rows had to move
  int32_t status;    // StatusBit
};

// What one verdict found for one request.
struct Emission {
  const int64_t* tokens;  // [count]
  const float* logprobs;  // [count] or null
  int32_t count;
  int32_t drafted;
  int32_t accepted;
  int32_t status;
  int32_t moved;
  bool bonus;  // the closing token came behind a draft that had no children
};

struct Record {
  int64_t generated() const { return static_cast<int64_t>(tokens.size()) - prompt_length; }

  // The most new tokens still to go: every round in flight emits at least one.
  int64_t most_left() const { return limits.max_new_tokens - generated() - in_flight; }

  // After this, emit() of as many tokens cannot throw.
  void reserve_round(int64_t tokens_of_round, bool keep_logprobs);

  // Takes tokens up to the first that ends the text; returns what ended it. `total` counts along.
  Finish emit(const Emission& emission, Counters& total);

  // Keeps the first n generated tokens. A round that is cut keeps its drafts in the counters, as if the text
  // had ended there; a round that loses all its tokens has never been.
  void withdraw(int64_t n, Counters& total);

  Finish end_with(int64_t token) const;

  int64_t id = 0;
  Phase phase = Phase::waiting;
  Finish finish = Finish::none;
  int32_t slot = -1;   // of a live request
  int32_t status = 0;  // every bit that verification ever set for it
  Limits limits;
  int64_t prompt_length = 0;
  std::vector<int64_t> tokens;  // prompt, then generated
  std::vector<Kind> kinds;      // [generated]
  std::vector<float> logprobs;  // [generated], when the session keeps them
  std::vector<Round> rounds;
  Counters counters;

  int64_t in_flight = 0;     // rounds of it that were issued and not settled, ...
  int64_t ahead_tokens = 0;  // ... and the most tokens they can emit

  bool pending = false;      // stands in the session's queue of events
  int64_t delivered = 0;     // generated tokens that events have handed out
  int64_t retracted = 0;     // of those, withdrawn since the last event
  int64_t event_drafts = 0;  // drafts checked since the last event
};

struct Event {
  int64_t id;
  Finish finish;  // none: goes on
  int64_t retracted;
  int64_t num_drafts;
  std::vector<int64_t> tokens;
  std::vector<Kind> kinds;
  std::vector<float> logprobs;
};

}  // namespace foretoken::loop

// The state machine behind foretoken.Session: which request sits in which slot, what it has committed, what
// the next forward pass has to see, and what a verdict changes.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "loop/record.hpp"
#include "loop/step.hpp"

namespace foretoken::loop {

struct SessionConfig {
  int64_t max_batch;
  int64_t vocab_size;
  int64_t max_length;     // cache rows of a slot; prompt and new tokens of a request must fit
  int64_t num_drafts;     // the most that a row may draft in one round, one behind the other
  int64_t num_nodes;      // the most that a row may draft in one round as a tree; 0: chains only
  int64_t prefill_chunk;  // prompt tokens of a row in one prefill step
  bool logprobs;
};

// What verification found, rows as in the planned step.
struct Verdict {
  const int64_t* tokens;        // [B, N+1]
  int64_t row_stride;           // of tokens and logprobs
  const int32_t* num_emitted;   // [B]
  const int32_t* num_accepted;  // [B]
  const int32_t* status;        // [B]
  const float* logprobs;        // [B, N+1] or null
  const int32_t* path;          // [B, N] node numbers; read of trees alone
};

// What a drafter proposes, rows as in the planned step.
struct Drafts {
  const int64_t* tokens;  // [B, N]
  int64_t row_stride;
  int64_t columns;
  const int32_t* num_drafts;  // [B]
  const int32_t* parents;     // [B, N] parent of node i + 1, or null: chains
  int64_t parents_stride;
};

// One owner of every length: lengths(slot) counts the target's valid cache rows. It is committed tokens - 1
// from the first decode round on, and the fed part of the prompt before.
//
// A round: plan() picks rows; for a decode step the caller drafts and hands the drafts to draft(); commit_*()
// settles it. Until then the step is outstanding, and plan() builds it again with the same rows, tokens and
// drafts, less the rows of requests that have been finished since. Requests are admitted to slots only when
// nothing is outstanding.
//
// Every call either does all it says or throws and changes nothing.
class Session {
 public:
  explicit Session(const SessionConfig& config);

  int64_t admit(const int64_t* prompt, int64_t count, Limits limits);
  void finish(int64_t id, Finish reason);  // of a finished request: nothing happens

  // Keeps n generated tokens and finishes the request. Returns the slot that still holds its cache rows, or
  // -1.
  int32_t truncate(int64_t id, int64_t n, Finish reason);
  void release(int64_t id);

  // Builds the next step; kind none: nothing is live or waiting. A new decode step holds the roots alone and,
  // with `drafting`, waits for draft() if needs_drafts(). True: it is the outstanding step again.
  bool plan(bool drafting);
  bool needs_drafts() const { return drafting_; }
  void draft(const Drafts& drafts);

  // Running ahead of the results, where verdicts stay on a device. plan_ahead() is plan() for rounds whose
  // predecessors may not be settled yet: it knows bounds instead of lengths, and leaves out requests that
  // have surely ended. Its decode step has slots, columns and max_length_after, and no tokens. Unless it
  // admits, no request that waits gets a slot. launch() says that the round was issued; settle() takes the
  // record of the oldest that was (ops/commit.hpp), of `columns` tokens a row.
  bool plan_ahead(bool admits);
  void launch();
  void settle(const int32_t* record, int64_t stride, int64_t columns);
  int64_t in_flight() const { return static_cast<int64_t>(launched_.size()); }
  int64_t rows_in_flight() const { return static_cast<int64_t>(launched_.front().ids.size()); }

  void commit_prefill();
  void commit_decode(const Verdict& verdict);

  // Tokens of the planned rows from position starts[slot] on, at most tokens_from_limit() a row; none for
  // rows that may not draft. Returns the width of the packed [B, width] result in from_tokens(), counts in
  // from_counts().
  int64_t tokens_from(const int64_t* starts, int64_t slots);

  // From now on every slot's text stands in history() too, for those who read texts as one tensor.
  void keep_history();

  // The oldest request with something to tell since its last event; false: none has.
  bool take_event(Event& event);
  const Record& record(int64_t id) const;
  const SessionConfig& config() const { return config_; }
  const Counters& counters() const { return counters_; }
  int64_t steps() const { return steps_; }
  int64_t bad_drafts() const { return bad_drafts_; }
  int64_t live() const { return live_; }
  int64_t waiting() const { return static_cast<int64_t>(waiting_.size()); }

  // Rows of the planned step.
  const std::vector<int64_t>& row_ids() const { return row_ids_; }
  const std::vector<int32_t>& kept_rows() const {
    return kept_rows_;
  }  // of the first plan, after rows were dropped
  int64_t rows_version() const { return rows_version_; }  // changes whenever row_ids() does
  int64_t max_budget() const { return max_budget_; }
  // Rows that may not end yet, as (row, columns): their EOS and stop ids are masked in so many leading
  // columns.
  std::vector<std::pair<int64_t, int64_t>> held_open() const;
  bool any_held_open() const { return any_held_open_; }
  // Requests that got a slot, until forget_assigned().
  const std::vector<std::pair<int64_t, int32_t>>& assigned() const { return assigned_; }
  void forget_assigned() { assigned_.clear(); }

  // Sized once: the binding hands out views.
  Step& step() { return step_; }
  std::vector<int64_t>& base() { return base_; }      // [B] committed tokens
  std::vector<int64_t>& limits() { return limits_; }  // [B] committed tokens when max_new_tokens are there
  std::vector<int32_t>& budget() { return budget_; }  // [B] how many drafts the row may check in line
  std::vector<int32_t>& nodes() { return nodes_; }    // [B] and how many as a tree of that depth
  std::vector<int32_t>& num_drafts() { return num_drafts_; }  // [B] how many it does check
  std::vector<int64_t>& drafts() { return drafts_; }          // [B, N], packed
  std::vector<int32_t>& parents() { return parents_; }  // the same of a tree; empty where there are none
  std::vector<int64_t>& from_tokens() { return from_tokens_; }
  std::vector<int32_t>& from_counts() { return from_counts_; }
  std::vector<int64_t>& lengths() { return lengths_; }  // [max_batch], by slot
  // [max_batch, max_length], prompt and output of each slot, and [max_batch]; empty before keep_history()
  std::vector<int32_t>& history() { return history_; }
  std::vector<int32_t>& prompt_lengths() { return prompt_lengths_; }
  int64_t tokens_from_limit() const { return from_limit_; }

 private:
  struct Slot {
    Record* owner = nullptr;
    int64_t last_id = -1;  // whose rows the cache still holds
  };
  struct Launched {
    std::vector<int64_t> ids;
    int64_t most_tokens;  // that a row can emit
  };

  Record& at(int64_t id);
  void check_limits(int64_t count, const Limits& limits) const;
  void assign_waiting();
  bool choose_rows();
  void drop_finished_rows();
  template <typename T>
  void pack(const T* from, int64_t stride, int64_t columns, std::vector<T>& to) const;
  void check_drafts(const Drafts& drafts) const;
  int64_t deepest(const Drafts& drafts, int64_t b) const;
  bool are_chains(const Drafts& drafts) const;
  void see_trees();
  void check_path(const Verdict& verdict, int64_t b) const;
  int32_t moved_rows(const Verdict& verdict, int64_t b) const;
  bool closes_with_bonus(const Verdict& verdict, int64_t b) const;
  bool plan_step(void (Session::*build_rows)(), bool drafting, bool admits);
  void choose_budgets();
  void build_prefill();
  void build_decode();
  void build_ahead();
  Record* find(int64_t id);
  void check_record(const int32_t* line, int64_t columns, const Record& record) const;
  void settle_row(const int32_t* line, int64_t columns, Record& record);
  void note(Record& record);
  void set_finished(Record& record, Finish reason);
  void check_verdict(const Verdict& verdict) const;
  void write_history(const Record& record, int64_t from);

  const SessionConfig config_;
  const int64_t from_limit_;
  std::unordered_map<int64_t, std::unique_ptr<Record>> records_;
  std::deque<int64_t> waiting_;
  std::vector<Slot> slots_;
  std::vector<int64_t> pending_;  // requests with something to tell, in order, from pending_head_ on
  size_t pending_head_ = 0;
  std::vector<std::pair<int64_t, int32_t>> assigned_;
  int64_t next_id_ = 0;
  int64_t live_ = 0;
  int64_t steps_ = 0;
  int64_t bad_drafts_ = 0;
  Counters counters_;

  Step step_;
  bool outstanding_ = false;
  bool drafting_ = false;
  bool any_held_open_ = false;
  int64_t rows_version_ = 0;
  int64_t max_budget_ = 0;
  int64_t drafted_columns_ = 0;
  std::deque<Launched> launched_;
  std::vector<int64_t> row_ids_;
  std::vector<Record*> rows_;
  std::vector<int32_t> kept_rows_;
  std::vector<int64_t> base_, limits_, drafts_, from_tokens_, lengths_;
  std::vector<int32_t> budget_, nodes_, num_drafts_, parents_, from_counts_, history_, prompt_lengths_;
  bool trees_ = false;  // the drafts of the outstanding step have parents
};

}  // namespace foretoken::loop

#include "loop/session.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

namespace foretoken::loop {
namespace {

std::string text(int64_t number) { return std::to_string(number); }

template <typename T>
void move(const T* from, int64_t count, T* to) {
  std::memmove(to, from, count * sizeof(T));
}

const SessionConfig& checked(const SessionConfig& config) {
  const auto at_least = [](const char* name, int64_t value, int64_t least) {
    if (value >= least) return;
    throw std::invalid_argument(std::string(name) + ": expected at least " + text(least) + ", got " +
                                text(value));
  };
  at_least("max_batch", config.max_batch, 1);
  at_least("vocab_size", config.vocab_size, 1);
  at_least("max_length", config.max_length, 2);
  at_least("num_drafts", config.num_drafts, 0);
  at_least("nodes", config.num_nodes, 0);
  at_least("prefill_chunk", config.prefill_chunk, 1);
  if (config.vocab_size > INT32_MAX) {
    throw std::invalid_argument("vocab_size: expected less than 2^31, got " + text(config.vocab_size));
  }
  for (const auto& [name, count] :
       {std::pair{"num_drafts", config.num_drafts}, {"nodes", config.num_nodes}}) {
    if (count > 255)
      throw std::invalid_argument(std::string(name) + ": expected at most 255, got " + text(count));
  }
  return config;
}

int64_t most_drafts(const SessionConfig& config) { return std::max(config.num_drafts, config.num_nodes); }

}  // namespace

Session::Session(const SessionConfig& config)
    : config_(checked(config)),
      from_limit_(std::max(config.prefill_chunk, config.num_drafts + 2)),
      slots_(config.max_batch),
      counters_(config.num_drafts, config.num_nodes),
      step_(config.max_batch, std::max(config.prefill_chunk, most_drafts(config) + 1),
            config.num_nodes > 0 ? most_drafts(config) + 1 : 0),
      base_(config.max_batch),
      limits_(config.max_batch),
      drafts_(config.max_batch * most_drafts(config)),
      from_tokens_(config.max_batch * from_limit_),
      lengths_(config.max_batch),
      budget_(config.max_batch),
      nodes_(config.max_batch),
      num_drafts_(config.max_batch),
      parents_(config.num_nodes > 0 ? drafts_.size() : 0),
      from_counts_(config.max_batch) {
  // Nothing on the way of a round may have to allocate for its rows.
  row_ids_.reserve(config.max_batch);
  rows_.reserve(config.max_batch);
  kept_rows_.reserve(config.max_batch);
}

// ---- requests ----

Record& Session::at(int64_t id) {
  const auto found = records_.find(id);
  if (found == records_.end())
    throw std::invalid_argument("request " + text(id) + " is not known (never admitted, or released)");
  return *found->second;
}

const Record& Session::record(int64_t id) const { return const_cast<Session*>(this)->at(id); }

void Session::check_limits(int64_t count, const Limits& limits) const {
  if (count < 1) throw std::invalid_argument("prompt_ids: expected at least one token, got none");
  if (limits.max_new_tokens < 1) {
    throw std::invalid_argument("max_new_tokens: expected at least 1, got " + text(limits.max_new_tokens));
  }
  if (limits.min_new_tokens < 0 || limits.min_new_tokens > limits.max_new_tokens) {
    throw std::invalid_argument("min_new_tokens: expected 0 to max_new_tokens (" +
                                text(limits.max_new_tokens) + "), got " + text(limits.min_new_tokens));
  }
  if (limits.num_drafts < 0 || limits.num_drafts > config_.num_drafts) {
    throw std::invalid_argument("num_drafts: expected 0 to the session's " + text(config_.num_drafts) +
                                ", got " + text(limits.num_drafts));
  }
  if (limits.max_new_tokens > config_.max_length - count) {
    throw std::invalid_argument("max_new_tokens: " + text(count) + " prompt tokens and " +
                                text(limits.max_new_tokens) + " new ones do not fit max_length " +
                                text(config_.max_length));
  }
}

int64_t Session::admit(const int64_t* prompt, int64_t count, Limits limits) {
  check_limits(count, limits);
  for (int64_t i = 0; i < count; ++i) {
    if (prompt[i] < 0 || prompt[i] >= config_.vocab_size) {
      throw std::invalid_argument("prompt_ids: expected ids in [0, " + text(config_.vocab_size) + "), got " +
                                  text(prompt[i]) + " at " + text(i));
    }
  }
  auto record = std::make_unique<Record>();
  record->id = next_id_;
  record->prompt_length = count;
  record->tokens.reserve(count + std::min<int64_t>(limits.max_new_tokens, 4096));
  record->tokens.assign(prompt, prompt + count);
  record->counters = Counters(limits.num_drafts, limits.num_drafts > 0 ? config_.num_nodes : 0);
  record->limits = std::move(limits);
  waiting_.push_back(next_id_);
  try {
    records_.emplace(next_id_, std::move(record));
  } catch (...) {
    waiting_.pop_back();
    throw;
  }
  return next_id_++;
}

void Session::note(Record& record) {
  if (record.pending) return;
  pending_.push_back(record.id);
  record.pending = true;
}

void Session::set_finished(Record& record, Finish reason) {
  if (record.phase == Phase::prefill || record.phase == Phase::decode) {
    slots_[record.slot].owner = nullptr;
    --live_;
  }
  record.phase = Phase::finished;
  record.finish = reason;
}

void Session::finish(int64_t id, Finish reason) {
  Record& record = at(id);
  if (record.phase == Phase::finished) return;
  note(record);
  if (record.phase == Phase::waiting) waiting_.erase(std::find(waiting_.begin(), waiting_.end(), id));
  set_finished(record, reason);
}

int32_t Session::truncate(int64_t id, int64_t n, Finish reason) {
  Record& record = at(id);
  if (n < 0 || n > record.generated()) {
    throw std::invalid_argument("n: expected 0 to " + text(record.generated()) + " generated tokens, got " +
                                text(n));
  }
  note(record);
  if (record.phase == Phase::waiting) waiting_.erase(std::find(waiting_.begin(), waiting_.end(), id));
  record.withdraw(n, counters_);
  set_finished(record, reason);
  if (record.slot < 0 || slots_[record.slot].last_id != id) return -1;
  int64_t& length = lengths_[record.slot];
  length = std::min(length, record.prompt_length + n - 1);
  return record.slot;
}

void Session::release(int64_t id) {
  const Record& record = at(id);
  if (record.phase != Phase::finished) {
    throw std::invalid_argument("request " + text(id) + " is still live: finish or cancel it before release");
  }
  std::replace(rows_.begin(), rows_.end(), const_cast<Record*>(&record), static_cast<Record*>(nullptr));
  pending_.erase(std::remove(pending_.begin() + pending_head_, pending_.end(), id), pending_.end());
  if (record.slot >= 0 && slots_[record.slot].last_id == id) slots_[record.slot].last_id = -1;
  records_.erase(id);
}

bool Session::take_event(Event& event) {
  if (pending_head_ == pending_.size()) return false;
  Record& record = at(pending_[pending_head_]);
  const int64_t from = record.delivered;
  event = Event{record.id, record.finish, record.retracted, record.event_drafts, {}, {}, {}};
  event.tokens.assign(record.tokens.begin() + record.prompt_length + from, record.tokens.end());
  event.kinds.assign(record.kinds.begin() + from, record.kinds.end());
  if (!record.logprobs.empty()) event.logprobs.assign(record.logprobs.begin() + from, record.logprobs.end());
  record.pending = false;
  record.delivered = record.generated();
  record.retracted = record.event_drafts = 0;
  if (++pending_head_ * 2 >= pending_.size()) {
    pending_.erase(pending_.begin(), pending_.begin() + pending_head_);
    pending_head_ = 0;
  }
  return true;
}

// ---- the next step ----

void Session::assign_waiting() {
  if (waiting_.empty()) return;
  assigned_.reserve(assigned_.size() + config_.max_batch);
  for (int64_t s = 0; s < config_.max_batch && !waiting_.empty(); ++s) {
    Slot& slot = slots_[s];
    if (slot.owner != nullptr) continue;
    Record& record = at(waiting_.front());
    waiting_.pop_front();
    slot.owner = &record;
    slot.last_id = record.id;
    record.slot = static_cast<int32_t>(s);
    record.phase = record.prompt_length > 1 ? Phase::prefill : Phase::decode;
    lengths_[s] = 0;
    write_history(record, 0);
    ++live_;
    assigned_.emplace_back(record.id, record.slot);
  }
}

void Session::keep_history() {
  if (!history_.empty()) return;
  std::vector<int32_t> prompts(config_.max_batch), texts(config_.max_batch * config_.max_length);
  prompt_lengths_.swap(prompts);
  history_.swap(texts);
  for (const Slot& slot : slots_) {
    if (slot.owner != nullptr) write_history(*slot.owner, 0);
  }
}

// Tokens of a live request from number `from` on. What was withdrawn is not taken out: its request has ended.
void Session::write_history(const Record& record, int64_t from) {
  if (history_.empty()) return;
  prompt_lengths_[record.slot] = static_cast<int32_t>(record.prompt_length);
  int32_t* const to = &history_[record.slot * config_.max_length];
  const int64_t size = static_cast<int64_t>(record.tokens.size());
  for (int64_t i = from; i < size; ++i) to[i] = static_cast<int32_t>(record.tokens[i]);
}

// Rows of one phase, ascending slots; prompts first. False: nobody is live.
bool Session::choose_rows() {
  const bool prefill = std::any_of(slots_.begin(), slots_.end(), [](const Slot& slot) {
    return slot.owner != nullptr && slot.owner->phase == Phase::prefill;
  });
  const Phase phase = prefill ? Phase::prefill : Phase::decode;
  const auto takes_part = [phase](const Slot& slot) {
    return slot.owner != nullptr && slot.owner->phase == phase && slot.owner->most_left() > 0;
  };
  int64_t count = 0;
  bool same = true;
  for (const Slot& slot : slots_) {
    if (!takes_part(slot)) continue;
    same = same && count < static_cast<int64_t>(row_ids_.size()) && row_ids_[count] == slot.owner->id;
    ++count;
  }
  if (!same || count != static_cast<int64_t>(row_ids_.size())) ++rows_version_;
  rows_.clear();
  row_ids_.clear();
  kept_rows_.clear();
  for (const Slot& slot : slots_) {
    if (!takes_part(slot)) continue;
    kept_rows_.push_back(static_cast<int32_t>(rows_.size()));
    rows_.push_back(slot.owner);
    row_ids_.push_back(slot.owner->id);
  }
  step_.begin(rows_.empty() ? StepKind::none : prefill ? StepKind::prefill : StepKind::decode, 0);
  return !rows_.empty();
}

void Session::choose_budgets() {
  max_budget_ = 0;
  any_held_open_ = false;
  for (size_t b = 0; b < rows_.size(); ++b) {
    const Record& record = *rows_[b];
    const int64_t remaining = record.most_left();
    const int64_t room = config_.max_length - 1 - lengths_[record.slot];
    const int64_t budget = std::max<int64_t>(std::min({record.limits.num_drafts, remaining - 1, room}), 0);
    budget_[b] = static_cast<int32_t>(budget);
    nodes_[b] = budget_[b];
    if (budget > 0) nodes_[b] = static_cast<int32_t>(std::max(budget, std::min(config_.num_nodes, room)));
    num_drafts_[b] = 0;
    base_[b] = static_cast<int64_t>(record.tokens.size());
    limits_[b] = record.prompt_length + record.limits.max_new_tokens;
    max_budget_ = std::max(max_budget_, budget);
    any_held_open_ = any_held_open_ || record.generated() < record.limits.min_new_tokens;
  }
}

void Session::build_prefill() {
  int64_t columns = 0;
  for (const Record* record : rows_) {
    columns = std::max(columns,
                       std::min(config_.prefill_chunk, record->prompt_length - 1 - lengths_[record->slot]));
  }
  step_.begin(StepKind::prefill, columns);
  for (const Record* record : rows_) {
    const int64_t length = lengths_[record->slot];
    const int64_t count = std::min(columns, record->prompt_length - 1 - length);
    std::copy_n(&record->tokens[length], count, step_.add_row(record->slot, length, count));
  }
}

void Session::build_decode() {
  step_.begin(StepKind::decode, drafted_columns_ + 1);
  for (size_t b = 0; b < rows_.size(); ++b) {
    const Record& record = *rows_[b];
    int64_t* const row = step_.add_row(record.slot, lengths_[record.slot], 1 + num_drafts_[b]);
    row[0] = record.tokens.back();
    std::copy_n(drafts_.data() + b * drafted_columns_, num_drafts_[b], row + 1);
  }
  if (trees_) see_trees();
}

void Session::drop_finished_rows() {
  size_t left = 0;
  int64_t longest = 0;
  for (size_t b = 0; b < rows_.size(); ++b) {
    if (rows_[b] == nullptr || rows_[b]->phase == Phase::finished) continue;
    rows_[left] = rows_[b];
    row_ids_[left] = row_ids_[b];
    kept_rows_[left] = kept_rows_[b];
    base_[left] = base_[b];
    limits_[left] = limits_[b];
    budget_[left] = budget_[b];
    nodes_[left] = nodes_[b];
    num_drafts_[left] = num_drafts_[b];
    const int64_t from = b * drafted_columns_, to = left * drafted_columns_;
    move(&drafts_[from], num_drafts_[b], &drafts_[to]);
    if (trees_) move(&parents_[from], num_drafts_[b], &parents_[to]);
    longest = std::max<int64_t>(longest, num_drafts_[b]);
    ++left;
  }
  if (left == rows_.size()) return;
  rows_.resize(left);
  row_ids_.resize(left);
  kept_rows_.resize(left);
  ++rows_version_;
  pack(drafts_.data(), drafted_columns_, longest, drafts_);
  if (trees_) pack(parents_.data(), drafted_columns_, longest, parents_);
  drafted_columns_ = longest;
}

// Drafts of the rows, from rows `stride` apart to `columns` columns. They may lie there already.
template <typename T>
void Session::pack(const T* from, int64_t stride, int64_t columns, std::vector<T>& to) const {
  for (size_t b = 0; b < rows_.size(); ++b) {
    T* const row = to.data() + b * columns;
    move(from + b * stride, num_drafts_[b], row);
    std::fill(row + num_drafts_[b], row + columns, T{0});
  }
}

bool Session::plan(bool drafting) { return plan_step(&Session::build_decode, drafting, true); }

bool Session::plan_step(void (Session::*build_rows)(), bool drafting, bool admits) {
  if (outstanding_) {
    drop_finished_rows();
    if (!rows_.empty()) {
      step_.kind == StepKind::prefill ? build_prefill() : (this->*build_rows)();
      return true;
    }
    outstanding_ = false;
  }
  drafting_ = trees_ = false;
  drafted_columns_ = 0;
  if (admits) assign_waiting();
  if (!choose_rows()) return false;
  if (step_.kind == StepKind::prefill) {
    build_prefill();
    outstanding_ = true;
    return false;
  }
  choose_budgets();
  (this->*build_rows)();
  drafting_ = drafting && max_budget_ > 0;
  outstanding_ = !drafting_;
  return false;
}

void Session::draft(const Drafts& drafts) {
  if (!drafting_) throw std::logic_error("draft: no decode step waits for drafts");
  check_drafts(drafts);
  int64_t longest = 0;
  for (size_t b = 0; b < rows_.size(); ++b) {
    const int64_t* const from = drafts.tokens + b * drafts.row_stride;
    const int64_t count = drafts.num_drafts[b], vocab = config_.vocab_size;
    // An id that the target cannot even be fed costs the row its drafts, as an unusable proposal does in
    // verify.
    const bool usable =
        std::all_of(from, from + count, [vocab](int64_t id) { return id >= 0 && id < vocab; });
    num_drafts_[b] = usable ? drafts.num_drafts[b] : 0;
    bad_drafts_ += usable ? 0 : 1;
    longest = std::max<int64_t>(longest, num_drafts_[b]);
  }
  trees_ = drafts.parents != nullptr && !are_chains(drafts);
  pack(drafts.tokens, drafts.row_stride, longest, drafts_);
  if (trees_) pack(drafts.parents, drafts.parents_stride, longest, parents_);
  drafted_columns_ = longest;
  build_decode();
  drafting_ = false;
  outstanding_ = true;
}

int64_t Session::tokens_from(const int64_t* starts, int64_t slots) {
  int64_t width = 0;
  for (size_t b = 0; b < rows_.size(); ++b) {
    const Record& record = *rows_[b];
    if (record.slot >= slots)
      throw std::invalid_argument("starts: expected one entry per slot, got " + text(slots));
    const int64_t size = static_cast<int64_t>(record.tokens.size());
    const int64_t start = starts[record.slot];
    if (start < 0 || start > size) {
      throw std::invalid_argument("starts: expected 0 to " + text(size) + " for slot " + text(record.slot) +
                                  ", got " + text(start));
    }
    from_counts_[b] = budget_[b] == 0 ? 0 : static_cast<int32_t>(std::min(size - start, from_limit_));
    width = std::max<int64_t>(width, from_counts_[b]);
  }
  for (size_t b = 0; b < rows_.size(); ++b) {
    const auto from = rows_[b]->tokens.begin() + starts[rows_[b]->slot];
    const auto to = from_tokens_.begin() + b * width;
    std::copy(from, from + from_counts_[b], to);
    std::fill(to + from_counts_[b], to + width, int64_t{0});
  }
  return width;
}

std::vector<std::pair<int64_t, int64_t>> Session::held_open() const {
  std::vector<std::pair<int64_t, int64_t>> open;
  for (size_t b = 0; b < rows_.size(); ++b) {
    if (rows_[b] == nullptr) continue;
    const int64_t missing = rows_[b]->limits.min_new_tokens - rows_[b]->generated();
    if (missing > 0) open.emplace_back(b, std::min(missing, step_.columns));
  }
  return open;
}

// ---- settling it ----

void Session::commit_prefill() {
  if (!outstanding_ || step_.kind != StepKind::prefill)
    throw std::logic_error("commit: no prefill step is outstanding");
  for (size_t b = 0; b < rows_.size(); ++b) {
    Record* const record = rows_[b];
    if (record == nullptr || record->phase == Phase::finished) continue;
    lengths_[record->slot] += step_.num_tokens[b];
    if (lengths_[record->slot] == record->prompt_length - 1) record->phase = Phase::decode;
  }
  outstanding_ = false;
}

void Session::check_verdict(const Verdict& verdict) const {
  for (size_t b = 0; b < rows_.size(); ++b) {
    if (rows_[b] == nullptr || rows_[b]->phase == Phase::finished) continue;
    const int32_t emitted = verdict.num_emitted[b], accepted = verdict.num_accepted[b];
    if (accepted < 0 || accepted > num_drafts_[b] || emitted != accepted + 1) {
      throw std::runtime_error("verdict: row " + text(b) + " of " + text(num_drafts_[b]) +
                               " drafts accepts " + text(accepted) + " and emits " + text(emitted));
    }
    if (trees_) check_path(verdict, static_cast<int64_t>(b));
    for (int32_t i = 0; i < emitted; ++i) {
      const int64_t token = verdict.tokens[b * verdict.row_stride + i];
      if (token < 0 || token >= config_.vocab_size) {
        throw std::runtime_error("verdict: row " + text(b) + " emits token " + text(token) +
                                 ", outside the vocabulary");
      }
    }
  }
}

void Session::commit_decode(const Verdict& verdict) {
  if (!outstanding_ || step_.kind != StepKind::decode)
    throw std::logic_error("commit: no decode step is outstanding");
  check_verdict(verdict);
  pending_.reserve(pending_.size() + rows_.size());
  for (Record* record : rows_) {
    if (record != nullptr) record->reserve_round(step_.columns, config_.logprobs);
  }
  ++steps_;
  for (size_t b = 0; b < rows_.size(); ++b) {
    Record* const record = rows_[b];
    if (record == nullptr || record->phase == Phase::finished) continue;
    const int64_t at = b * verdict.row_stride;
    const Emission emission{verdict.tokens + at,
                            verdict.logprobs == nullptr ? nullptr : verdict.logprobs + at,
                            verdict.num_emitted[b],
                            num_drafts_[b],
                            verdict.num_accepted[b],
                            verdict.status[b],
                            moved_rows(verdict, static_cast<int64_t>(b)),
                            closes_with_bonus(verdict, static_cast<int64_t>(b))};
    const Finish end = record->emit(emission, counters_);
    write_history(*record, lengths_[record->slot] + 1);
    lengths_[record->slot] = static_cast<int64_t>(record->tokens.size()) - 1;
    note(*record);
    if (end != Finish::none) set_finished(*record, end);
  }
  outstanding_ = false;
}

}  // namespace foretoken::loop

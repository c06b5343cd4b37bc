// The session where rounds are issued before the last ones are known.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "loop/session.hpp"
#include "ops/commit.hpp"

namespace foretoken::loop {

Record* Session::find(int64_t id) {
  const auto found = records_.find(id);
  return found == records_.end() ? nullptr : found->second.get();
}

void Session::build_ahead() {
  // Drafts of a tree are as many in every round that has any: shapes do not depend on results.
  const bool trees = config_.num_nodes > 0 && max_budget_ > 0;
  step_.begin(StepKind::decode, 1 + (trees ? config_.num_nodes : max_budget_));
  step_.tree = trees;
  step_.uniform = false;
  for (const Record* record : rows_) {
    step_.slots[step_.rows++] = record->slot;
    const int64_t tokens = static_cast<int64_t>(record->tokens.size());
    const int64_t most =
        std::min(tokens + record->ahead_tokens, record->prompt_length + record->limits.max_new_tokens);
    step_.shortfall[step_.rows - 1] = most - 1 + step_.columns;
    step_.max_length_after = std::max(step_.max_length_after, most - 1 + step_.columns);
  }
  for (int64_t row = 0; row < step_.rows; ++row) {
    step_.shortfall[row] = step_.max_length_after - step_.shortfall[row];
  }
}

bool Session::plan_ahead(bool admits) { return plan_step(&Session::build_ahead, false, admits); }

void Session::launch() {
  if (!outstanding_ || step_.kind != StepKind::decode) {
    throw std::logic_error("commit: no decode step is outstanding");
  }
  launched_.push_back({row_ids_, 1 + max_budget_});
  for (Record* record : rows_) {
    if (record == nullptr) continue;
    ++record->in_flight;
    record->ahead_tokens += launched_.back().most_tokens;
  }
  ++steps_;
  outstanding_ = false;
}

void Session::check_record(const int32_t* line, int64_t columns, const Record& record) const {
  const int32_t drafted = line[kRecordDrafted], emitted = line[kRecordEmitted],
                accepted = line[kRecordAccepted];
  const std::string name = "verdict: request " + std::to_string(record.id);
  // Of a tree fewer may be accepted than are drafted: no path is longer than the request's budget.
  const bool fits = drafted >= 0 && drafted < static_cast<int64_t>(record.counters.rounds_by_drafts.size()) &&
                    accepted >= 0 && accepted <= std::min<int64_t>(drafted, record.limits.num_drafts);
  if (!fits || emitted != accepted + 1 || emitted > columns) {
    throw std::runtime_error(name + " with " + std::to_string(drafted) + " drafts accepts " +
                             std::to_string(accepted) + " and emits " + std::to_string(emitted) +
                             " (status " + std::to_string(line[kRecordStatus]) + ")");
  }
  for (int32_t i = 0; i < emitted; ++i) {
    const int64_t token = line[kRecordFields + i];
    if (token < 0 || token >= config_.vocab_size) {
      throw std::runtime_error(name + " emits token " + std::to_string(token) + ", outside the vocabulary");
    }
  }
}

void Session::settle_row(const int32_t* line, int64_t columns, Record& record) {
  const int32_t* const first = line + kRecordFields;
  const std::vector<int64_t> tokens(first, first + line[kRecordEmitted]);
  std::vector<float> logprobs;
  if (config_.logprobs) {
    const float* const bits = reinterpret_cast<const float*>(first + columns);
    logprobs.assign(bits, bits + tokens.size());
  }
  const Emission emission{tokens.data(),         config_.logprobs ? logprobs.data() : nullptr,
                          line[kRecordEmitted],  line[kRecordDrafted],
                          line[kRecordAccepted], line[kRecordStatus],
                          line[kRecordMoved],    line[kRecordBonus] != 0};
  const int64_t before = record.generated();
  const Finish end = record.emit(emission, counters_);
  lengths_[record.slot] = static_cast<int64_t>(record.tokens.size()) - 1;
  note(record);
  if (end != Finish::none) set_finished(record, end);
  if (record.generated() - before != line[kRecordKept] || static_cast<int32_t>(end) != line[kRecordEnd]) {
    throw std::runtime_error("verdict: host and device disagree on where request " +
                             std::to_string(record.id) + " ends");
  }
}

void Session::settle(const int32_t* record, int64_t stride, int64_t columns) {
  if (launched_.empty()) throw std::logic_error("settle: no round is in flight");
  const Launched round = std::move(launched_.front());
  launched_.pop_front();
  std::vector<Record*> rows;
  for (const int64_t id : round.ids) {
    Record* const row = find(id);
    rows.push_back(row);
    if (row == nullptr) continue;
    --row->in_flight;
    row->ahead_tokens -= round.most_tokens;
  }
  for (size_t b = 0; b < rows.size(); ++b) {
    const int32_t* const line = record + static_cast<int64_t>(b) * stride;
    // What has ended meanwhile is left as it is: the device ran on without knowing.
    if (rows[b] == nullptr || rows[b]->phase == Phase::finished) continue;
    check_record(line, columns, *rows[b]);
    rows[b]->reserve_round(columns, config_.logprobs);
    settle_row(line, columns, *rows[b]);
  }
}

}  // namespace foretoken::loop

#include "loop/draft_steps.hpp"

#include <stdexcept>
#include <string>

namespace foretoken::loop {
namespace {

constexpr int64_t kMostInDecode = 2;  // tokens that a row may take in with the step of its first draft

int64_t at_least(const char* name, int64_t value, int64_t least) {
  if (value >= least) return value;
  throw std::invalid_argument(std::string(name) + ": expected at least " + std::to_string(least) + ", got " +
                              std::to_string(value));
}

}  // namespace

DraftSteps::DraftSteps(int64_t max_batch, int64_t max_length, int64_t chunk)
    : max_length_(at_least("max_length", max_length, 1)),
      chunk_(at_least("chunk", chunk, 1)),
      step_(at_least("max_batch", max_batch, 1), std::max(chunk, kMostInDecode)),
      held_(max_batch),
      slots_(max_batch),
      num_drafts_(max_batch),
      lengths_(max_batch),
      active_(max_batch),
      base_(max_batch) {}

void DraftSteps::check_slot(int64_t slot) const {
  if (slot >= 0 && slot < static_cast<int64_t>(held_.size())) return;
  throw std::invalid_argument("slot: expected 0 to " + std::to_string(held_.size() - 1) + ", got " +
                              std::to_string(slot));
}

void DraftSteps::reset(int64_t slot) {
  check_slot(slot);
  held_[slot] = 0;
}

void DraftSteps::truncate(int64_t slot, int64_t length) {
  check_slot(slot);
  held_[slot] = std::min(held_[slot], length);
}

int64_t DraftSteps::begin(int64_t rows, const int32_t* slots, const int64_t* lengths, const int32_t* budget) {
  if (rows > step_.max_rows) {
    throw std::invalid_argument("max_batch: expected at least " + std::to_string(rows) + ", got " +
                                std::to_string(step_.max_rows));
  }
  for (int64_t b = 0; b < rows; ++b) check_slot(slots[b]);
  rows_ = rows;
  drawn_ = 0;
  drawing_ = false;
  int64_t most = 0;
  for (int64_t b = 0; b < rows; ++b) {
    slots_[b] = slots[b];
    lengths_[b] = lengths[b];
    // A proposal that broke off may have left rows of drafts, or the root's, behind.
    held_[slots[b]] = std::min(held_[slots[b]], lengths[b]);
    const int64_t room = max_length_ - lengths[b];
    num_drafts_[b] = static_cast<int32_t>(std::max<int64_t>(std::min<int64_t>(budget[b], room), 0));
    most = std::max<int64_t>(most, num_drafts_[b]);
  }
  choose_active(0);
  return most;
}

void DraftSteps::choose_active(int64_t drawn) {
  num_active_ = 0;
  for (int64_t b = 0; b < rows_; ++b) {
    if (num_drafts_[b] <= drawn) continue;
    active_[num_active_] = b;
    base_[num_active_] = lengths_[b] + 1;
    ++num_active_;
  }
}

const Step& DraftSteps::feed(const int64_t* tokens, int64_t width, const int32_t* counts) {
  for (int64_t i = 0; i < num_active_; ++i) {
    const int64_t b = active_[i];
    const int64_t lag = lengths_[b] + 1 - held_[slots_[b]];
    if (counts[b] <= width && counts[b] <= lag && counts[b] >= std::min(lag, kMostInDecode)) continue;
    throw std::invalid_argument("counts: row " + std::to_string(b) + " cannot take in " +
                                std::to_string(counts[b]) + " tokens");
  }
  if (!prefill(tokens, width, counts)) decode(tokens, width, counts);
  return step_;
}

// Rows that lag by more than two tokens, all of their tokens but the last.
bool DraftSteps::prefill(const int64_t* tokens, int64_t width, const int32_t* counts) {
  const auto share = [&](int64_t b) {
    const int64_t lag = lengths_[b] + 1 - held_[slots_[b]];
    return lag > kMostInDecode ? std::min({int64_t{counts[b]}, lag - 1, chunk_}) : 0;
  };
  int64_t columns = 0;
  for (int64_t i = 0; i < num_active_; ++i) columns = std::max(columns, share(active_[i]));
  if (columns == 0) return false;
  step_.begin(StepKind::prefill, columns);
  for (int64_t i = 0; i < num_active_; ++i) {
    const int64_t b = active_[i];
    const int64_t count = share(b);
    if (count > 0) std::copy_n(tokens + b * width, count, step_.add_row(slots_[b], held_[slots_[b]], count));
  }
  return true;
}

void DraftSteps::decode(const int64_t* tokens, int64_t width, const int32_t* counts) {
  int64_t columns = 1;
  for (int64_t i = 0; i < num_active_; ++i) columns = std::max<int64_t>(columns, counts[active_[i]]);
  step_.begin(StepKind::decode, columns);
  for (int64_t i = 0; i < num_active_; ++i) {
    const int64_t b = active_[i];
    std::copy_n(tokens + b * width, counts[b], step_.add_row(slots_[b], held_[slots_[b]], counts[b]));
  }
  drawing_ = true;
}

void DraftSteps::fed() {
  if (step_.kind != StepKind::prefill) throw std::logic_error("fed: no prefill step is outstanding");
  for (int64_t i = 0; i < step_.rows; ++i) held_[step_.slots[i]] += step_.num_tokens[i];
  step_.begin(StepKind::none, 0);
}

void DraftSteps::hold_step() {
  if (!drawing_) throw std::logic_error("drawn: no decode step is outstanding");
  for (int64_t i = 0; i < step_.rows; ++i) held_[step_.slots[i]] = step_.lengths[i] + step_.num_tokens[i];
}

void DraftSteps::rooted() {
  hold_step();
  step_.begin(StepKind::none, 0);
  drawing_ = false;
}

void DraftSteps::keep(int64_t rows, const int32_t* slots, const int64_t* lengths) {
  for (int64_t b = 0; b < rows; ++b) {
    check_slot(slots[b]);
    if (lengths[b] >= 0 && lengths[b] <= max_length_) continue;
    throw std::invalid_argument("lengths: expected 0 to " + std::to_string(max_length_) + ", got " +
                                std::to_string(lengths[b]));
  }
  for (int64_t b = 0; b < rows; ++b) held_[slots[b]] = lengths[b];
}

const Step& DraftSteps::drawn(const int64_t* draws) {
  hold_step();
  ++drawn_;
  const int64_t before = num_active_;
  int64_t next = 0;
  // Rows that have all their drafts leave; the others feed what they have just drawn.
  for (int64_t i = 0; i < before; ++i) {
    const int64_t b = active_[i];
    if (num_drafts_[b] <= drawn_) continue;
    if (next == 0) step_.begin(StepKind::decode, 1);
    *step_.add_row(slots_[b], lengths_[b] + drawn_, 1) = draws[i];
    active_[next] = b;
    base_[next] = lengths_[b] + 1;
    ++next;
  }
  num_active_ = next;
  if (next == 0) {
    step_.begin(StepKind::none, 0);
    drawing_ = false;
  }
  return step_;
}

void DraftSteps::observe(int64_t rows, const int32_t* slots, const int64_t* next_lengths) {
  for (int64_t b = 0; b < rows; ++b) check_slot(slots[b]);
  for (int64_t b = 0; b < rows; ++b) held_[slots[b]] = std::min(held_[slots[b]], next_lengths[b]);
}

}  // namespace foretoken::loop

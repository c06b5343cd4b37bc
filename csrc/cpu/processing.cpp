#include "cpu/processing.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include "ops/logit_edits.hpp"

namespace foretoken::cpu {

namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();
constexpr int32_t kUnseen = -1;

void copy_row(const Row& row, std::vector<float>& out) {
  const RowKernels& kernels = row_kernels();
  out.resize(static_cast<size_t>(tiles_of(row.size) * kTile));  // the kernel writes whole tiles
  for (int64_t first = 0; first < row.size; first += kTile) {
    kernels.load(row.data, row.dtype, first, std::min<int64_t>(kTile, row.size - first), kMasked,
                 out.data() + first);
  }
  out.resize(static_cast<size_t>(row.size));
}

}  // namespace

LogitEdits::LogitEdits(const SamplingView& sampling, int64_t slot, const HistoryView& history, int64_t base,
                       int64_t vocab, const TensorView& vocab_map)
    : map_(vocab_map), text_(history.tokens), slot_(slot), base_(base), vocab_(vocab) {
  if (sampling.constraints == nullptr || !sampling.constraints[slot].any()) return;
  constraints_ = &sampling.constraints[slot];
  if (map_) {
    inverse_.assign(static_cast<size_t>(vocab), -1);
    for (int64_t element = 0; element < map_.shape[0]; ++element) {
      const int64_t id = read_index(map_, element);
      if (id >= 0 && id < vocab) inverse_[static_cast<size_t>(id)] = static_cast<int32_t>(element);
    }
  }
  if (!constraints_->needs_history()) return;
  const int64_t prompt = prompt_within(history, slot, base);
  usable_ = prompt >= 0;
  if (!usable_) return;
  generated_ = base - prompt;
  if (constraints_->penalises()) count(prompt);
}

void LogitEdits::count(int64_t prompt) {
  counts_.assign(static_cast<size_t>(vocab_), kUnseen);
  for (int64_t i = 0; i < base_; ++i) {
    const int64_t id = read_index(text_, slot_, i);
    if (id < 0 || id >= vocab_) continue;
    int32_t& times = counts_[static_cast<size_t>(id)];
    if (times == kUnseen) {
      times = 0;
      seen_.push_back(id);
    }
    times += i >= prompt ? 1 : 0;
  }
}

int64_t LogitEdits::element_of(int64_t id) const {
  if (id < 0 || id >= vocab_) return -1;
  return map_ ? inverse_[static_cast<size_t>(id)] : id;
}

void LogitEdits::mask(int64_t id, std::vector<float>& out) const {
  const int64_t element = element_of(id);
  if (element >= 0 && element < static_cast<int64_t>(out.size())) out[static_cast<size_t>(element)] = kMasked;
}

void LogitEdits::penalise(const std::vector<int64_t>& path, std::vector<float>& out) const {
  struct Drafted {
    float* logit;
    float before;
    int32_t generated;
  };
  const auto logit_of = [&](int64_t id) -> float* {
    const int64_t element = element_of(id);
    const bool there = element >= 0 && element < static_cast<int64_t>(out.size());
    return there ? &out[static_cast<size_t>(element)] : nullptr;
  };
  // Drafted tokens are few: they start from their own logits again, whatever the text has made of them.
  std::vector<int64_t> sorted = path;
  std::sort(sorted.begin(), sorted.end());
  std::vector<Drafted> drafted;
  for (size_t i = 0; i < sorted.size(); ++i) {
    float* const logit = logit_of(sorted[i]);
    if (logit == nullptr) continue;
    if (i == 0 || sorted[i] != sorted[i - 1]) {
      drafted.push_back({logit, *logit, std::max(counts_[static_cast<size_t>(sorted[i])], 0)});
    }
    ++drafted.back().generated;
  }
  for (const int64_t id : seen_) {
    float* const logit = logit_of(id);
    if (logit != nullptr) *logit = penalised(*constraints_, *logit, counts_[static_cast<size_t>(id)]);
  }
  for (const Drafted& token : drafted) {
    *token.logit = penalised(*constraints_, token.before, token.generated);
  }
}

void LogitEdits::ban_words(const std::vector<int64_t>& path, std::vector<float>& out) const {
  const int64_t length = base_ + static_cast<int64_t>(path.size());
  const auto before = [&](int64_t back) {  // 1: the token just before the one to come
    const int64_t at = length - back;
    return at < base_ ? read_index(text_, slot_, at) : path[static_cast<size_t>(at - base_)];
  };
  int32_t first = 0;
  for (int64_t word = 0; word < constraints_->num_bad_words; ++word) {
    const int32_t end = constraints_->bad_word_ends[word];
    if (ends_in_word(*constraints_, first, end, length, before)) mask(constraints_->bad_words[end - 1], out);
    first = end;
  }
}

void LogitEdits::edit(const Row& row, const std::vector<int64_t>& path, const int32_t* bitmask,
                      int64_t bitmask_stride, std::vector<float>& out) const {
  copy_row(row, out);
  if (constraints_ != nullptr) {
    const Constraints& rule = *constraints_;
    for (int64_t i = 0; i < rule.num_bias; ++i) {
      const int64_t element = element_of(rule.bias_ids[i]);
      if (element >= 0 && element < row.size) out[static_cast<size_t>(element)] += rule.bias[i];
    }
    if (rule.penalises()) penalise(path, out);
    ban_words(path, out);
    if (generated_ + static_cast<int64_t>(path.size()) < rule.min_new_tokens) {
      for (int64_t i = 0; i < rule.num_held; ++i) mask(rule.held_ids[i], out);
    }
  }
  if (bitmask != nullptr) {
    for (int64_t id = 0; id < row.size; ++id) {
      const uint32_t word = static_cast<uint32_t>(bitmask[id / 32 * bitmask_stride]);
      if (((word >> (id % 32)) & 1u) == 0) out[static_cast<size_t>(id)] = kMasked;
    }
  }
  if (map_) {
    for (int64_t element = 0; element < row.size; ++element) {
      const int64_t id = read_index(map_, element);
      if (id < 0 || id >= vocab_) out[static_cast<size_t>(element)] = kMasked;
    }
  }
}

}  // namespace foretoken::cpu

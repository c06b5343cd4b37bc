#include "cpu/processing.hpp"

#include <algorithm>
#include <limits>
#include <utility>

namespace foretoken::cpu {

namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();

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
    : map_(vocab_map), vocab_(vocab) {
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
  const int64_t prompt = read_index(history.prompt_lengths, slot);
  usable_ = slot < history.tokens.shape[0] && base >= 0 && base <= history.tokens.shape[1] && prompt >= 0 &&
            prompt <= base;
  if (!usable_) return;
  generated_ = base - prompt;
  committed_.reserve(static_cast<size_t>(base));
  for (int64_t i = 0; i < base; ++i) committed_.push_back(read_index(history.tokens, slot, i));
  std::vector<std::pair<int64_t, bool>> sorted;  // (id, generated)
  sorted.reserve(committed_.size());
  for (int64_t i = 0; i < base; ++i) sorted.emplace_back(committed_[static_cast<size_t>(i)], i >= prompt);
  std::sort(sorted.begin(), sorted.end());
  for (const auto& [id, generated] : sorted) {
    if (seen_.empty() || seen_.back() != id) {
      seen_.push_back(id);
      counts_.push_back(0);
    }
    counts_.back() += generated ? 1 : 0;
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
  const Constraints& rule = *constraints_;
  if (rule.repetition == 1.0f && rule.frequency == 0.0f && rule.presence == 0.0f) return;
  const auto apply = [&](int64_t id, int32_t count) {
    const int64_t element = element_of(id);
    if (element < 0 || element >= static_cast<int64_t>(out.size())) return;
    float& logit = out[static_cast<size_t>(element)];
    if (rule.repetition != 1.0f) logit = logit > 0.0f ? logit / rule.repetition : logit * rule.repetition;
    if (count > 0) {
      logit -= rule.frequency * static_cast<float>(count);
      logit -= rule.presence;
    }
  };
  std::vector<int64_t> drafted = path;
  std::sort(drafted.begin(), drafted.end());
  const auto drafted_count = [&](int64_t id) {
    const auto [first, last] = std::equal_range(drafted.begin(), drafted.end(), id);
    return static_cast<int32_t>(last - first);
  };
  for (size_t i = 0; i < seen_.size(); ++i) apply(seen_[i], counts_[i] + drafted_count(seen_[i]));
  for (size_t i = 0; i < drafted.size(); ++i) {
    const bool again = i > 0 && drafted[i] == drafted[i - 1];
    if (!again && !std::binary_search(seen_.begin(), seen_.end(), drafted[i])) {
      apply(drafted[i], drafted_count(drafted[i]));
    }
  }
}

void LogitEdits::ban_words(const std::vector<int64_t>& path, std::vector<float>& out) const {
  const int64_t committed = static_cast<int64_t>(committed_.size());
  const int64_t length = committed + static_cast<int64_t>(path.size());
  const auto before = [&](int64_t back) {  // 1: the token just before the one to come
    const int64_t at = length - back;
    return at < committed ? committed_[static_cast<size_t>(at)] : path[static_cast<size_t>(at - committed)];
  };
  int32_t first = 0;
  for (int64_t word = 0; word < constraints_->num_bad_words; ++word) {
    const int32_t end = constraints_->bad_word_ends[word];
    const int32_t preceding = end - first - 1;
    bool matches = preceding <= length;
    for (int32_t i = 0; matches && i < preceding; ++i) {
      matches = before(preceding - i) == constraints_->bad_words[first + i];
    }
    if (matches) mask(constraints_->bad_words[end - 1], out);
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
    penalise(path, out);
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

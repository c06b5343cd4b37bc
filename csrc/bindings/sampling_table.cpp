#include "bindings/sampling_table.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

namespace foretoken {

namespace {

[[noreturn]] void refuse(const char* name, const char* expected, double got) {
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
}

[[noreturn]] void refuse(const char* name, const char* expected, int64_t got) {
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
}

int32_t checked_id(const char* name, int64_t id) {
  if (id < 0 || id > INT32_MAX) refuse(name, "token ids in [0, 2^31)", id);
  return static_cast<int32_t>(id);
}

void check_penalties(const ConstraintValues& values) {
  if (!(values.repetition > 0.0 && values.repetition <= 1e6)) {
    refuse("repetition_penalty", "a positive number", values.repetition);
  }
  if (!(std::fabs(values.frequency) <= 1e6)) {
    refuse("frequency_penalty", "a finite number", values.frequency);
  }
  if (!(std::fabs(values.presence) <= 1e6)) refuse("presence_penalty", "a finite number", values.presence);
  if (values.min_new_tokens < 0 || values.min_new_tokens > INT32_MAX) {
    refuse("min_new_tokens", "0 or a positive count", values.min_new_tokens);
  }
}

}  // namespace

SamplingTable::SamplingTable(int64_t size) {
  if (size < 0) throw std::invalid_argument("size: expected 0 or more slots, got " + std::to_string(size));
  const size_t slots = static_cast<size_t>(size);
  temperature_.assign(slots, 1.0f);
  top_k_.assign(slots, 0);
  top_p_.assign(slots, 1.0f);
  min_p_.assign(slots, 0.0f);
  seed_.assign(slots, 0);
  constraints_.resize(slots);
  lists_.resize(slots);
}

size_t SamplingTable::index_of(int64_t slot) const {
  if (slot < 0 || slot >= size()) {
    throw std::out_of_range("slot: expected 0 to " + std::to_string(size() - 1) + ", got " +
                            std::to_string(slot));
  }
  return static_cast<size_t>(slot);
}

void SamplingTable::replace(size_t index, Lists lists, Constraints constraints) {
  ++version_;
  const auto count = [&](const Constraints& of, int64_t sign) {
    constrained_ += of.any() ? sign : 0;
    histories_ += of.needs_history() ? sign : 0;
  };
  count(constraints_[index], -1);
  lists_[index] = std::move(lists);
  const Lists& kept = lists_[index];
  constraints.bias_ids = kept.bias_ids.data();
  constraints.bias = kept.bias.data();
  constraints.num_bias = static_cast<int64_t>(kept.bias_ids.size());
  constraints.held_ids = kept.held_ids.data();
  constraints.num_held = static_cast<int64_t>(kept.held_ids.size());
  constraints.bad_words = kept.bad_words.data();
  constraints.bad_word_ends = kept.bad_word_ends.data();
  constraints.num_bad_words = static_cast<int64_t>(kept.bad_word_ends.size());
  constraints_[index] = constraints;
  count(constraints, 1);
}

void SamplingTable::constrain(int64_t slot, const ConstraintValues& values) {
  const size_t index = index_of(slot);
  check_penalties(values);
  Lists lists;
  for (int64_t id : values.held_ids) lists.held_ids.push_back(checked_id("stop_ids", id));
  for (size_t i = 0; i < values.bias_ids.size(); ++i) {
    const double bias = values.bias[i];
    if (!(bias < 1e30)) refuse("logit_bias", "finite numbers or -inf", bias);
    lists.bias_ids.push_back(checked_id("logit_bias", values.bias_ids[i]));
    lists.bias.push_back(static_cast<float>(bias));
  }
  std::vector<int32_t> sorted = lists.bias_ids;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) refuse("logit_bias", "each token once", int64_t{*twice});
  for (const auto& word : values.bad_words) {
    if (word.empty())
      throw std::invalid_argument("bad_words: expected sequences of at least one token, got an empty one");
    for (int64_t id : word) lists.bad_words.push_back(checked_id("bad_words", id));
    lists.bad_word_ends.push_back(static_cast<int32_t>(lists.bad_words.size()));
  }
  Constraints constraints;
  constraints.repetition = static_cast<float>(values.repetition);
  constraints.frequency = static_cast<float>(values.frequency);
  constraints.presence = static_cast<float>(values.presence);
  constraints.min_new_tokens = lists.held_ids.empty() ? 0 : static_cast<int32_t>(values.min_new_tokens);
  replace(index, std::move(lists), constraints);
}

void SamplingTable::set(int64_t slot, double temperature, int64_t top_k, double top_p, double min_p,
                        uint64_t seed) {
  const size_t index = index_of(slot);
  // The negated comparisons refuse NaN as well.
  if (temperature != 0.0 && !(temperature >= 1e-6 && temperature <= 1e6)) {
    refuse("temperature", "0 (greedy) or 1e-6 to 1e6", temperature);
  }
  if (top_k < 0 || top_k > INT32_MAX) refuse("top_k", "0 (off) or a positive count", top_k);
  if (!(top_p > 0.0 && top_p <= 1.0)) refuse("top_p", "a number in (0, 1]", top_p);
  if (!(min_p >= 0.0 && min_p < 1.0)) refuse("min_p", "a number in [0, 1)", min_p);
  count(index, -1);
  temperature_[index] = static_cast<float>(temperature);
  top_k_[index] = static_cast<int32_t>(top_k);
  top_p_[index] = static_cast<float>(top_p);
  min_p_[index] = static_cast<float>(min_p);
  seed_[index] = seed;
  count(index, 1);
  replace(index, {}, {});
}

void SamplingTable::copy(int64_t slot, const SamplingTable& source, int64_t from) {
  const size_t to = index_of(slot), at = source.index_of(from);
  count(to, -1);
  temperature_[to] = source.temperature_[at];
  top_k_[to] = source.top_k_[at];
  top_p_[to] = source.top_p_[at];
  min_p_[to] = source.min_p_[at];
  seed_[to] = source.seed_[at];
  count(to, 1);
  replace(to, source.lists_[at], source.constraints_[at]);
}

}  // namespace foretoken

// The sampling law of S request slots, as Python fills it and the kernels read it.
#pragma once

#include <cstdint>
#include <vector>

#include "dispatch.hpp"

namespace foretoken {

// Penalties, bias and bans of one slot, as Python gives them.
struct ConstraintValues {
  double repetition = 1.0, frequency = 0.0, presence = 0.0;
  int64_t min_new_tokens = 0;
  std::vector<int64_t> held_ids, bias_ids;
  std::vector<double> bias;
  std::vector<std::vector<int64_t>> bad_words;
};

class SamplingTable {
 public:
  explicit SamplingTable(int64_t size);
  SamplingTable(const SamplingTable&) = delete;  // constraints point into lists beside them
  SamplingTable& operator=(const SamplingTable&) = delete;

  int64_t size() const { return static_cast<int64_t>(seed_.size()); }

  // Throws std::invalid_argument naming the argument and std::out_of_range for a slot outside the table.
  // The slot's constraints are taken off.
  void set(int64_t slot, double temperature, int64_t top_k, double top_p, double min_p, uint64_t seed);
  void constrain(int64_t slot, const ConstraintValues& values);
  // All of one slot of `source`, which may be this table.
  void copy(int64_t slot, const SamplingTable& source, int64_t from);

  bool needs_history() const { return histories_ > 0; }

  // The numbers and constraints where the device can read them. On CUDA a copy, made anew after a change.
  SamplingView view(Device device, Stream stream) const {
    return mirrors_.view(view(), version_, device, stream);
  }

  bool constrained() const { return constrained_ > 0; }
  bool weighs_rows() const { return weighing_ > 0; }

  SamplingView view() const {
    return {temperature_.data(),
            top_k_.data(),
            top_p_.data(),
            min_p_.data(),
            seed_.data(),
            size(),
            constrained_ > 0 ? constraints_.data() : nullptr,
            weighs_rows(),
            filtering_ > 0};
  }

 private:
  struct Lists {  // what the constraints of a slot point into
    std::vector<int32_t> bias_ids, held_ids, bad_words, bad_word_ends;
    std::vector<float> bias;
  };

  size_t index_of(int64_t slot) const;
  // Adds a slot to the counts of slots, or takes it off.
  void count(size_t index, int64_t sign) {
    weighing_ += weighs_row(index) ? sign : 0;
    filtering_ += filters_row(index) ? sign : 0;
  }
  bool weighs_row(size_t index) const {
    return temperature_[index] != 0.0f && top_p_[index] < 1.0f && top_k_[index] == 0;
  }
  bool filters_row(size_t index) const {
    return temperature_[index] != 0.0f && (top_k_[index] > 0 || top_p_[index] < 1.0f || min_p_[index] > 0.0f);
  }
  void replace(size_t index, Lists lists, Constraints constraints);

  std::vector<float> temperature_, top_p_, min_p_;
  std::vector<int32_t> top_k_;
  std::vector<uint64_t> seed_;
  std::vector<Constraints> constraints_;
  std::vector<Lists> lists_;
  int64_t constrained_ = 0, histories_ = 0;  // slots that have any, and that need their history
  int64_t weighing_ = 0;                     // slots with top-p and without top-k
  int64_t filtering_ = 0;                    // slots with any filter
  uint64_t version_ = 0;                     // counts changes
  mutable dispatch::SamplingMirrors mirrors_;
};

}  // namespace foretoken

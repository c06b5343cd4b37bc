// The sampling law of S request slots, as Python fills it and the kernels read it.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/sampling.hpp"

namespace foretoken {

class SamplingTable {
 public:
  explicit SamplingTable(int64_t size);

  int64_t size() const { return static_cast<int64_t>(seed_.size()); }

  // Throws std::invalid_argument naming the argument and std::out_of_range for a slot outside the table.
  void set(int64_t slot, double temperature, int64_t top_k, double top_p, double min_p, uint64_t seed);

  SamplingView view() const {
    return {temperature_.data(), top_k_.data(), top_p_.data(), min_p_.data(), seed_.data(), size()};
  }

 private:
  std::vector<float> temperature_, top_p_, min_p_;
  std::vector<int32_t> top_k_;
  std::vector<uint64_t> seed_;
};

}  // namespace foretoken

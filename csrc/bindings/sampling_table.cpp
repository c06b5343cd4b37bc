#include "bindings/sampling_table.hpp"

#include <cmath>
#include <stdexcept>
#include <string>

namespace foretoken {

namespace {

[[noreturn]] void refuse(const char* name, const char* expected, double got) {
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
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
}

void SamplingTable::set(int64_t slot, double temperature, int64_t top_k, double top_p, double min_p,
                        uint64_t seed) {
  if (slot < 0 || slot >= size()) {
    throw std::out_of_range("slot: expected 0 to " + std::to_string(size() - 1) + ", got " +
                            std::to_string(slot));
  }
  // The negated comparisons refuse NaN as well.
  if (temperature != 0.0 && !(temperature >= 1e-6 && temperature <= 1e6)) {
    refuse("temperature", "0 (greedy) or 1e-6 to 1e6", temperature);
  }
  if (top_k < 0 || top_k > INT32_MAX)
    refuse("top_k", "0 (off) or a positive count", static_cast<double>(top_k));
  if (!(top_p > 0.0 && top_p <= 1.0)) refuse("top_p", "a number in (0, 1]", top_p);
  if (!(min_p >= 0.0 && min_p < 1.0)) refuse("min_p", "a number in [0, 1)", min_p);
  const size_t index = static_cast<size_t>(slot);
  temperature_[index] = static_cast<float>(temperature);
  top_k_[index] = static_cast<int32_t>(top_k);
  top_p_[index] = static_cast<float>(top_p);
  min_p_[index] = static_cast<float>(min_p);
  seed_[index] = seed;
}

}  // namespace foretoken

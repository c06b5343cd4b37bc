// How far the lossy rules may go, as Python gives it.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "ops/verify.hpp"

namespace foretoken {

// A Tolerance with the numbers its pointer points to.
struct ToleranceValues {
  Tolerance numbers;
  std::vector<float> rates;

  Tolerance view() const {
    Tolerance result = numbers;
    result.rates = rates.data();
    result.num_rates = static_cast<int64_t>(rates.size());
    return result;
  }
};

[[noreturn]] inline void refuse_tolerance(const char* name, const char* expected, double got) {
  throw pybind11::value_error(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
}

inline ToleranceValues make_tolerance(float typical_epsilon, float typical_delta, float threshold_single,
                                      float threshold_sum, int32_t relaxed_top_k, float relaxed_delta,
                                      float window_entropy, float window_delta, std::vector<float> rates) {
  const auto in_unit = [](const char* name, float value) {
    if (!(value >= 0.0f && value <= 1.0f))
      refuse_tolerance(name, "a number in [0, 1]", static_cast<double>(value));
  };
  const auto not_negative = [](const char* name, float value) {
    if (!(value >= 0.0f && value <= 1e6f))
      refuse_tolerance(name, "a number of 0 and more", static_cast<double>(value));
  };
  in_unit("typical_epsilon", typical_epsilon);
  not_negative("typical_delta", typical_delta);
  in_unit("threshold_single", threshold_single);
  if (!(threshold_sum > 0.0f && threshold_sum <= 1.0f)) {
    refuse_tolerance("threshold_sum", "a number in (0, 1]", static_cast<double>(threshold_sum));
  }
  if (relaxed_top_k < 1) refuse_tolerance("relaxed_top_k", "a positive count", relaxed_top_k);
  not_negative("relaxed_delta", relaxed_delta);
  not_negative("window_entropy", window_entropy);
  not_negative("window_delta", window_delta);
  for (float rate : rates) in_unit("rates", rate);
  Tolerance numbers{typical_epsilon, typical_delta,  threshold_single, threshold_sum, relaxed_top_k,
                    relaxed_delta,   window_entropy, window_delta,     nullptr,       0};
  return {numbers, std::move(rates)};
}

}  // namespace foretoken

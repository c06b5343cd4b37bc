// Checks that several ops share.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/boundary.hpp"
#include "bindings/sampling_table.hpp"
#include "math/row_law.hpp"

namespace foretoken {

inline void check_vocab(const char* name, int64_t vocab) {
  if (vocab < 1 || vocab > kMaxVocab) {
    throw pybind11::value_error(std::string(name) + ": expected at most " + std::to_string(kMaxVocab) +
                                " tokens in the vocabulary, got " + std::to_string(vocab));
  }
}

inline void check_table(const char* name, const SamplingTable& table, pybind11::handle slots, int64_t batch) {
  if (slots.is_none() && table.size() < batch) {
    throw pybind11::value_error(std::string(name) + ": expected at least " + std::to_string(batch) +
                                " slots (one per row, as slots is None), got " +
                                std::to_string(table.size()));
  }
}

// `slots`: size of the sampling table, by whose slots the history is indexed.
inline void read_history(boundary::Intake& intake, pybind11::handle history, pybind11::handle prompt_lengths,
                         bool needed, int64_t slots, HistoryView& view) {
  using boundary::Dim;
  if (history.is_none() != prompt_lengths.is_none()) {
    throw pybind11::value_error(
        "prompt_lengths: expected with history, and only with it, got None for one of them");
  }
  if (needed && history.is_none()) {
    throw pybind11::value_error(
        "history: expected the committed tokens [S, L], as a penalty, bad word or minimum length of sampling "
        "asks for them, got None");
  }
  if (history.is_none()) return;
  int64_t length = 0;
  view.tokens =
      intake.read(history, "history", boundary::kIndexDTypes,
                  {Dim::at_least(needed ? slots : 0), Dim::bind(length, "L")}, boundary::Layout::any);
  view.prompt_lengths = intake.read(prompt_lengths, "prompt_lengths", boundary::kIndexDTypes,
                                    {view.tokens.shape[0]}, boundary::Layout::any);
}

}  // namespace foretoken

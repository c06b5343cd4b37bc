// Checks that several ops share.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/boundary.hpp"
#include "bindings/sampling_table.hpp"
#include "math/row_law.hpp"
#include "math/tree_index.hpp"
#include "ops/tree.hpp"

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

inline void check_positions(pybind11::handle lengths, pybind11::handle positions) {
  if (lengths.is_none() == positions.is_none()) return;
  throw pybind11::value_error(lengths.is_none()
                                  ? "lengths: expected int64 [B] beside out.positions, got None"
                                  : "out.positions: expected int64 [B, N + 1] beside lengths, got None");
}

// What kernels walk, of `drafts` draft nodes and a root.
inline void write_index_arrays(boundary::Intake& intake, TreeIndexArgs& args, int64_t batch, int64_t drafts,
                               pybind11::handle depth, pybind11::handle first_child,
                               pybind11::handle next_sibling, pybind11::handle ancestors,
                               pybind11::handle positions, pybind11::handle status) {
  constexpr auto any = boundary::Layout::any;
  const int64_t nodes = drafts + 1, words = words_of(nodes);
  args.depth = intake.write(depth, "out.depth", DType::int32, {batch, nodes}, any);
  args.first_child = intake.write(first_child, "out.first_child", DType::int32, {batch, nodes}, any);
  args.next_sibling = intake.write(next_sibling, "out.next_sibling", DType::int32, {batch, nodes}, any);
  args.ancestors = intake.write(ancestors, "out.ancestors", DType::int64, {batch, nodes, words}, any);
  args.positions = intake.write_or_null(positions, "out.positions", DType::int64, {batch, nodes}, any);
  args.status = intake.write(status, "out.status", DType::int32, {batch}, any);
}

}  // namespace foretoken

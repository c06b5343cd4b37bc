// The arrays of one forward pass: who takes part, which tokens, at which positions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace foretoken::loop {

enum class StepKind : uint8_t { none, prefill, decode };

constexpr int64_t kWordBits = 64;

inline int64_t words_of(int64_t columns) { return (columns + kWordBits - 1) / kWordBits; }

// B rows of T columns. Column i of row b is the token at position lengths[b] + i, written to cache row
// lengths[b] + i of slot slots[b]; columns from num_tokens[b] on are padding. In a step of trees the columns
// are nodes: the position counts depth, and what a node sees behind cache row visible[b] its ancestor words
// say. Sized once, so that views of the arrays stay good for the life of the owner.
struct Step {
  Step(int64_t max_rows, int64_t max_columns, int64_t max_nodes = 0)
      : max_rows(max_rows),
        max_columns(max_columns),
        tokens(max_rows * max_columns),
        positions(max_rows * max_columns),
        lengths(max_rows),
        slots(max_rows),
        num_tokens(max_rows),
        shortfall(max_rows),
        visible(max_nodes > 0 ? max_rows : 0),
        ancestors(max_rows * max_nodes * words_of(max_nodes)) {}

  void begin(StepKind the_kind, int64_t the_columns) {
    kind = the_kind;
    rows = 0;
    columns = the_columns;
    uniform = true;
    tree = false;
    max_length_after = 0;
  }

  // Appends a row of `count` tokens, which the caller writes to the address that comes back.
  int64_t* add_row(int32_t slot, int64_t length, int64_t count) {
    const int64_t b = rows++;
    slots[b] = slot;
    lengths[b] = length;
    num_tokens[b] = static_cast<int32_t>(count);
    int64_t* const row = &tokens[b * columns];
    std::fill(row + count, row + columns, int64_t{0});
    for (int64_t i = 0; i < columns; ++i) positions[b * columns + i] = length + i;
    uniform = uniform && count == columns;
    max_length_after = std::max(max_length_after, length + columns);
    return row;
  }

  bool contiguous_slots() const { return rows > 0 && slots[rows - 1] - slots[0] == rows - 1; }

  const int64_t max_rows;
  const int64_t max_columns;
  StepKind kind = StepKind::none;
  int64_t rows = 0;
  int64_t columns = 0;
  bool uniform = true;
  bool tree = false;
  int64_t max_length_after = 0;
  std::vector<int64_t> tokens;      // [B, T], packed
  std::vector<int64_t> positions;   // [B, T], packed
  std::vector<int64_t> lengths;     // [B]
  std::vector<int32_t> slots;       // [B], ascending
  std::vector<int32_t> num_tokens;  // [B]
  std::vector<int64_t>
      shortfall;                 // [B] rows by which it surely stays below max_length_after, of plan_ahead()
  std::vector<int64_t> visible;  // [B] of a tree: cache rows that every node sees
  std::vector<int64_t> ancestors;  // [B, T, W] of a tree, packed: bit j is cache row visible[b] + j
};

}  // namespace foretoken::loop

// Contract of a step's inputs: what the forwards of a round of chains are fed, from the state of its
// requests.
#pragma once

#include "math/portability.hpp"
#include "ops/tensor_view.hpp"

namespace foretoken {

constexpr int64_t kCatchUpColumns = 2;  // tokens that a draft model may lack when a round begins

struct StepInputsArgs {  // B rows of C = K + 1 columns, S slots, L tokens of text; everything is contiguous
  const int32_t* text = nullptr;         // [S, L]
  const int64_t* base = nullptr;         // [S] tokens of the text
  const int32_t* next_drafts = nullptr;  // [S] drafts that the round may check, -1: nobody is decoding
  const int32_t* seats = nullptr;        // [B] the slot of each row; none of the S: a padded row
  int64_t num_slots = 0, text_length = 0, rows = 0, columns = 0;
  // The target's step.
  int64_t* tokens = nullptr;      // [B, C] out: the last committed token; what drafts will replace is 0
  int64_t* positions = nullptr;   // [B, C] out
  int64_t* lengths = nullptr;     // [B] out: base - 1, 0 of a padded row
  int32_t* num_tokens = nullptr;  // [B] out: 1 + num_drafts, 0 of a padded row
  int32_t* num_drafts = nullptr;  // [B] out: -1 of a padded row, and where nobody is decoding
  int64_t* row_base = nullptr;    // [B] out: base; of a padded row 1
  int32_t* slots = nullptr;       // [B] out: the slot, 0 of a padded row
  // The steps of a draft model that keeps `cache_rows` rows a slot; null: no model drafts.
  int64_t* reach = nullptr;            // [S] in, out: cache rows that hold the text as it was drafted on
  int64_t* first_tokens = nullptr;     // [B, 2] out: the one or two tokens that its cache lacks
  int64_t* first_positions = nullptr;  // [B, 2] out
  int64_t* draft_lengths = nullptr;    // [K, B] out: of each of its steps
  int32_t* draft_used = nullptr;       // [2, B] out: tokens in the first step, and in each of the others
  int64_t cache_rows = 0;
};

namespace step_inputs {

FORETOKEN_HD inline int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }
FORETOKEN_HD inline int64_t at_least(int64_t value, int64_t least) { return value > least ? value : least; }

struct Row {
  int64_t slot = 0, base = 1;
  int64_t num_drafts = -1;
  bool padded = true;
};

FORETOKEN_HD inline int64_t token_at(const StepInputsArgs& args, const Row& row, int64_t position) {
  const int64_t inside = at_least(at_most(position, args.text_length - 1), 0);
  return row.padded ? 0 : args.text[row.slot * args.text_length + inside];
}

FORETOKEN_HD inline Row row_of(const StepInputsArgs& args, int64_t b) {
  Row row;
  const int64_t seat = args.seats[b];
  row.padded = seat < 0 || seat >= args.num_slots;
  if (row.padded) return row;
  row.slot = seat;
  row.base = args.base[seat];
  row.num_drafts = at_most(args.next_drafts[seat], args.columns - 1);
  if (args.reach != nullptr) {
    const int64_t room = at_least(args.cache_rows + 1 - row.base, 0);
    row.num_drafts = at_most(row.num_drafts, room);
  }
  return row;
}

// Rows that do not draft are kept inside a cache that may be shorter than the text.
FORETOKEN_HD inline int64_t inside(const StepInputsArgs& args, const Row& row, int64_t length, int64_t step,
                                   int64_t columns) {
  if (row.num_drafts > step) return length;
  return at_most(length, at_least(args.cache_rows - columns, 0));
}

FORETOKEN_HD inline void write_target(const StepInputsArgs& args, int64_t b, const Row& row, int64_t lane,
                                      int64_t lanes) {
  const int64_t length = row.base - 1;
  for (int64_t i = lane; i < args.columns; i += lanes) {
    args.tokens[b * args.columns + i] = i == 0 ? token_at(args, row, length) : 0;
    args.positions[b * args.columns + i] = length + i;
  }
  if (lane != 0) return;
  args.lengths[b] = length;
  args.num_tokens[b] = row.padded ? 0 : static_cast<int32_t>(1 + at_least(row.num_drafts, 0));
  args.num_drafts[b] = static_cast<int32_t>(row.num_drafts);
  args.row_base[b] = row.base;
  args.slots[b] = static_cast<int32_t>(row.slot);
}

// `held`: cache rows that hold tokens of the text, which all lanes have read before one writes `reach`.
FORETOKEN_HD inline void write_draft(const StepInputsArgs& args, int64_t b, const Row& row, int64_t held,
                                     int64_t lane, int64_t lanes) {
  const int64_t most = args.columns - 1;
  const int64_t lacking = at_least(at_most(row.base - held, kCatchUpColumns), 1);
  const int64_t first = inside(args, row, held, 0, kCatchUpColumns);
  for (int64_t i = lane; i < kCatchUpColumns; i += lanes) {
    args.first_tokens[b * kCatchUpColumns + i] = i < lacking ? token_at(args, row, first + i) : 0;
    args.first_positions[b * kCatchUpColumns + i] = first + i;
  }
  for (int64_t k = lane; k < most; k += lanes) {
    args.draft_lengths[k * args.rows + b] = k == 0 ? first : inside(args, row, row.base + (k - 1), k, 1);
  }
  if (lane != 0) return;
  args.draft_used[b] = row.padded ? 0 : static_cast<int32_t>(lacking);
  args.draft_used[args.rows + b] = row.padded ? 0 : 1;
  if (!row.padded) args.reach[row.slot] = row.base + (most - 1);
}

FORETOKEN_HD inline int64_t held_of(const StepInputsArgs& args, const Row& row) {
  if (row.padded) return 0;
  return at_least(at_most(args.reach[row.slot], row.base - 1), 0);
}

}  // namespace step_inputs

constexpr int64_t kMostNgram = 15;

struct NgramDraftsArgs {              // of rows as above, written by it; everything is contiguous
  const int32_t* text = nullptr;      // [S, L]
  const int64_t* row_base = nullptr;  // [B]
  const int32_t* slots = nullptr;     // [B]
  int64_t num_slots = 0, text_length = 0, rows = 0, columns = 0;
  int64_t min_ngram = 1, max_ngram = 1;  // at most kMostNgram
  int64_t* tokens = nullptr;      // [B, C] out: drafts behind the first column, 0 where nothing is found
  int32_t* num_drafts = nullptr;  // [B] in, out: 0 where nothing is found, -1 stays
  int32_t* num_tokens = nullptr;  // [B] in, out: 1 + num_drafts, 0 of a padded row stays
};

// Where the end of a text stood before: the longest match, of equals the most recent.
namespace ngram_drafts {

struct Row {
  const int32_t* text = nullptr;
  int64_t last = 0;  // its last token, in front of which the places lie
};

FORETOKEN_HD inline Row row_of(const NgramDraftsArgs& args, int64_t b) {
  const int64_t slot = args.slots[b];
  if (slot < 0 || slot >= args.num_slots) return {};
  return {args.text + slot * args.text_length,
          step_inputs::at_most(args.row_base[b] - 1, args.text_length - 1)};
}

// The larger the better; -1 where fewer than `min_ngram` tokens that end at a place end the text.
FORETOKEN_HD inline int64_t rank_of(const NgramDraftsArgs& args, const Row& row, int64_t place) {
  int64_t matched = 0;
  while (matched < args.max_ngram && matched <= place &&
         row.text[place - matched] == row.text[row.last - matched]) {
    ++matched;
  }
  return matched < args.min_ngram ? -1 : matched << 48 | place;
}

// What followed there; behind the end a copy goes on with itself.
FORETOKEN_HD inline void write_row(const NgramDraftsArgs& args, int64_t b, const Row& row, int64_t best,
                                   int64_t lane, int64_t lanes) {
  const int64_t place = best & ((int64_t{1} << 48) - 1), period = row.last - place;
  for (int64_t i = lane; i + 1 < args.columns; i += lanes) {
    args.tokens[b * args.columns + i + 1] = best < 0 ? 0 : row.text[place + 1 + i % period];
  }
  if (lane != 0) return;
  if (best < 0 && args.num_drafts[b] > 0) args.num_drafts[b] = 0;
  if (args.num_tokens[b] > 0) {
    args.num_tokens[b] = static_cast<int32_t>(1 + step_inputs::at_least(args.num_drafts[b], 0));
  }
}

}  // namespace ngram_drafts

struct LastLogitsArgs {  // B rows of T columns
  TensorView logits;     // [B, T, V] float32 | bfloat16 | float16, innermost stride 1
  TensorView used;       // [B] int32: the last of so many columns, the first of none; null: the last there is
  TensorView out;        // [B, W] of that dtype, innermost stride 1, W <= V: its first W logits
};

FORETOKEN_HD inline int64_t last_column(int64_t used, int64_t columns) {
  return step_inputs::at_least(step_inputs::at_most(used, columns) - 1, 0);
}

}  // namespace foretoken

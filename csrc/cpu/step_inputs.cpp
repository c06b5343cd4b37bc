#include "cpu/step_inputs.hpp"

#include <cstring>

#include "cpu/views.hpp"

namespace foretoken::cpu {

void write_step_inputs(const StepInputsArgs& args) {
  for (int64_t b = 0; b < args.rows; ++b) {
    const step_inputs::Row row = step_inputs::row_of(args, b);
    step_inputs::write_target(args, b, row, 0, 1);
    if (args.reach == nullptr) continue;
    step_inputs::write_draft(args, b, row, step_inputs::held_of(args, row), 0, 1);
  }
}

void draft_ngrams(const NgramDraftsArgs& args) {
  for (int64_t b = 0; b < args.rows; ++b) {
    const ngram_drafts::Row row = ngram_drafts::row_of(args, b);
    int64_t best = -1;
    for (int64_t place = 0; place < row.last; ++place) {
      best = step_inputs::at_least(best, ngram_drafts::rank_of(args, row, place));
    }
    ngram_drafts::write_row(args, b, row, best, 0, 1);
  }
}

void last_logits(const LastLogitsArgs& args) {
  const int64_t columns = args.logits.shape[1], bytes = bytes_of(args.out.dtype);
  for (int64_t b = 0; b < args.out.shape[0]; ++b) {
    const int64_t column = last_column(args.used ? read_index(args.used, b) : columns, columns);
    std::memcpy(static_cast<char*>(args.out.data) + offset_of(args.out, b) * bytes,
                static_cast<const char*>(args.logits.data) + offset_of(args.logits, b, column) * bytes,
                static_cast<size_t>(args.out.shape[1] * bytes));
  }
}

}  // namespace foretoken::cpu

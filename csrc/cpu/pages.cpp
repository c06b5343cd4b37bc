#include "cpu/pages.hpp"

#include <cstring>

#include "cpu/parallel.hpp"
#include "cpu/views.hpp"
#include "ops/sampling.hpp"

namespace foretoken::cpu {

namespace {

void apply(const PageState& state, const PageEdit& edit) {
  switch (edit.column) {
    case kEditLength: return write_index(state.lengths, edit.value, edit.slot);
    case kEditLengthFrom: return write_index(state.lengths, read_index(state.lengths, edit.value), edit.slot);
    case kEditCount: return write_index(state.counts, edit.value, edit.slot);
    case kEditRow: return write_index(state.row_slots, edit.value, edit.slot);
    default: break;
  }
  if (edit.value != kNoPageFromHere) {
    return write_index(state.block_table, edit.value, edit.slot, edit.column);
  }
  for (int64_t column = edit.column; column < state.block_table.shape[1]; ++column) {
    write_index(state.block_table, kNoPage, edit.slot, column);
  }
}

void copy_page(const CacheTensor& tensor, int64_t page_size, PageCopy copy) {
  const char* const from = tensor.data + copy.source * tensor.page_stride;
  char* const to = tensor.data + copy.target * tensor.page_stride;
  for (int64_t row = 0; row < page_size; ++row) {
    for (int64_t part = 0; part < tensor.parts; ++part) {
      const int64_t at = row * tensor.row_stride + part * tensor.part_stride;
      std::memcpy(to + at, from + at, static_cast<size_t>(tensor.part_bytes));
    }
  }
}

}  // namespace

void edit_pages(const EditPagesArgs& args) {
  for (int64_t i = 0; i < args.num_edits; ++i) apply(args.state, args.edits[i]);
}

void keep_rows(const KeepRowsArgs& args) {
  for (int64_t b = 0; b < args.record.shape[0]; ++b) {
    const int64_t slot = args.by_row_slots ? read_index(args.state.row_slots, b) : b;
    const int32_t kept = rows_kept(args, b, slot);
    if (kept > 0) write_index(args.state.lengths, read_index(args.state.lengths, slot) + kept, slot);
    write_index(args.record, kept, b);
    write_index(args.status, kept < 0 ? kBadRow : 0, b);
  }
}

void keep_apart(const KeepApartArgs& args) {
  for (int64_t b = 0; b < args.apart.shape[0]; ++b) keep_apart_row(args, b);
}

void gather_apart(const GatherApartArgs& args) {
  for (int64_t b = 0; b < args.apart.shape[0]; ++b) gather_apart_row(args, b);
}

void copy_pages(const CopyPagesArgs& args) {
  constexpr int64_t kBytesPerElement = 4;  // copied in the time that parallel_for reckons with
  const CacheTensor& first = args.tensors[0];
  const int64_t work = args.page_size * first.parts * first.part_bytes / kBytesPerElement;
  parallel_for(args.num_copies * args.num_tensors, work, [&](int64_t item) {
    copy_page(args.tensors[item % args.num_tensors], args.page_size, args.copies[item / args.num_tensors]);
  });
}

}  // namespace foretoken::cpu

// Contracts of what a paged cache keeps on its device: tables and lengths by slot, and copies of pages. The
// host says what changes in the arguments themselves, so that nothing it writes later can overtake a launch.
#pragma once

#include "ops/cache.hpp"

namespace foretoken {

constexpr int64_t kMostPageEdits = 256;   // of one launch
constexpr int64_t kMostPageCopies = 256;  // of one launch

// What a PageEdit changes, in place of a column of the block table.
enum PageEditField : int32_t {
  kEditLength = -1,      // lengths[slot] = value
  kEditLengthFrom = -2,  // lengths[slot] = lengths[value]
  kEditCount = -3,       // counts[slot] = value
  kEditRow = -4,         // row_slots[slot] = value: `slot` is a row of the round
};

// From a column of the table on, instead of a page.
enum PageEditValue : int32_t {
  kNoPage = -1,          // block_table[slot][column] = -1
  kNoPageFromHere = -2,  // and in all columns behind it
};

struct PageEdit {
  int32_t slot, column, value;
};

struct PageState {         // S slots of up to `columns` pages each
  TensorView block_table;  // [S, columns] int32
  TensorView lengths;      // [S] int64: committed rows
  TensorView counts;       // [S] int32: new rows of the slot's last round
  TensorView row_slots;    // [S] int32: slot of each row of the round, where row b is not slot b
};

struct EditPagesArgs {
  PageState state;        // out
  const PageEdit* edits;  // [num_edits] on the host, copied before the call returns; of one slot in order
  int64_t num_edits;
};

// What a round leaves of B rows: lengths grow by what is kept.
struct KeepRowsArgs {
  PageState state;     // lengths in, out; counts in
  bool by_row_slots;   // else row b is slot b
  TensorView kept;     // [B] int32 rows to keep, of 0 .. counts; null: all counts
  TensorView blocked;  // [B] int32: nothing is kept where it is not 0; may be null
  TensorView record;   // [B] int32 out: rows kept, -1 where the number is impossible or blocked
  TensorView status;   // [B] int32 out: kBadRow there
};

struct PageCopy {
  int32_t source, target;
};

struct CopyPagesArgs {
  const CacheTensor* tensors;  // [num_tensors] on the host
  int64_t num_tensors;
  const CacheUnit* units;  // [num_units] on the device; null on the CPU
  int64_t num_units;
  int64_t page_size;
  const PageCopy* copies;  // [num_copies] on the host, copied before the call returns; no page in two of them
                           // is a target
  int64_t num_copies;
};

// Rows of a slot's round that stay: -1 if the number is impossible.
FORETOKEN_HD inline int32_t rows_kept(const KeepRowsArgs& args, int64_t b, int64_t slot) {
  const int64_t count = integer_at(args.state.counts, slot);
  const int64_t kept = args.kept ? integer_at(args.kept, b) : count;
  if (count <= 0) return 0;
  if (kept < 0 || kept > count) return -1;
  if (kept > 0 && args.blocked && integer_at(args.blocked, b) != 0) return -1;
  return static_cast<int32_t>(kept);
}

}  // namespace foretoken

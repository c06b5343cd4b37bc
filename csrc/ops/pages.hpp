// Contracts of what a paged cache keeps on its device: tables and lengths by slot, and copies of pages. The
// host says what changes in the arguments themselves, so that nothing it writes later can overtake a launch.
#pragma once

#include "ops/cache.hpp"
#include "ops/sampling.hpp"

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

// Rows that are kept where they are: bit i of a slot's word is the row i behind its length.
constexpr int64_t kMostApart = 64;

struct KeepApartArgs {      // B rows whose new nodes begin `first` rows behind the length
  PageState state;          // counts, lengths in
  bool by_row_slots;        //
  int64_t first;            //
  TensorView kept;          // [B] int32: rows to keep, the root and num_accepted nodes; 0: none
  TensorView path;          // [B, D] int32 | int64 accepted nodes, ascending from 1
  TensorView num_accepted;  // [B] int32
  TensorView apart;         // [B] int64 in, out: bits of what is kept
  TensorView reached;       // [B] int64 out: length, with what is kept apart
  TensorView status;        // [B] int32 out: kBadRow where they lie in no row of the round, and none is kept
};

// What is kept apart, as a compaction and the end of a round take it.
struct GatherApartArgs {
  TensorView apart;         // [B] int64
  TensorView lengths;       // [B] int64
  TensorView starts;        // [B] int64 out: `lengths` of the compaction
  TensorView path;          // [B, kMostApart] int32 out
  TensorView num_accepted;  // [B] int32 out
  TensorView kept;          // [B] int32 out
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

// Bits of the nodes of row b that stay; unusable where there are no such nodes.
struct ApartBits {
  uint64_t bits = 0;
  bool usable = true;
};

FORETOKEN_HD inline ApartBits apart_bits(const KeepApartArgs& args, int64_t b, int64_t slot) {
  const int64_t nodes = integer_at(args.state.counts, slot) - args.first;
  const int64_t kept = integer_at(args.kept, b);
  if (kept == 0 || nodes <= 0) return {};
  const int64_t accepted = integer_at(args.num_accepted, b);
  if (kept != accepted + 1 || accepted < 0 || accepted > args.path.shape[1]) return {0, false};
  ApartBits found{uint64_t{1} << args.first, true};
  int64_t before = 0;
  for (int64_t i = 0; i < accepted; ++i) {
    const int64_t node = integer_at(args.path, b, i);
    if (node <= before || node >= nodes) return {0, false};
    found.bits |= uint64_t{1} << (args.first + node);
    before = node;
  }
  return found;
}

FORETOKEN_HD inline int32_t count_bits(uint64_t bits) {
  int32_t count = 0;
  for (; bits != 0; bits &= bits - 1) ++count;
  return count;
}

FORETOKEN_HD inline void keep_apart_row(const KeepApartArgs& args, int64_t b) {
  const int64_t slot = args.by_row_slots ? integer_at(args.state.row_slots, b) : b;
  const ApartBits found = apart_bits(args, b, slot);
  int64_t& word = static_cast<int64_t*>(args.apart.data)[b * args.apart.strides[0]];
  word |= static_cast<int64_t>(found.bits);
  static_cast<int64_t*>(args.reached.data)[b * args.reached.strides[0]] =
      integer_at(args.state.lengths, slot) + count_bits(static_cast<uint64_t>(word));
  static_cast<int32_t*>(args.status.data)[b * args.status.strides[0]] = found.usable ? 0 : kBadRow;
}

// A root in the first row stays there. Without one the row in front of it takes the root's part.
FORETOKEN_HD inline void gather_apart_row(const GatherApartArgs& args, int64_t b) {
  const auto word = static_cast<uint64_t>(integer_at(args.apart, b));
  const int32_t shift = (word & 1) != 0 || word == 0 ? 0 : 1, all = count_bits(word);
  auto* const path = static_cast<int32_t*>(args.path.data) + b * args.path.strides[0];
  int64_t listed = 0;
  for (int32_t i = 1 - shift; i < kMostApart; ++i) {
    if ((word >> i & 1) != 0) path[listed++ * args.path.strides[1]] = i + shift;
  }
  static_cast<int64_t*>(args.starts.data)[b * args.starts.strides[0]] = integer_at(args.lengths, b) - shift;
  static_cast<int32_t*>(args.num_accepted.data)[b * args.num_accepted.strides[0]] =
      static_cast<int32_t>(listed);
  static_cast<int32_t*>(args.kept.data)[b * args.kept.strides[0]] = all;
}

}  // namespace foretoken

// Contracts of the moves in K/V caches: writing a round's new rows, and closing the gaps behind an accepted
// path.
#pragma once

#include "ops/tensor_view.hpp"

namespace foretoken {

constexpr int64_t kMostSlots = int64_t{1} << 32;
constexpr int64_t kMostPathNodes = 255;  // of trees of 256 nodes

// Where a request's slots lie in tensors of [pages, page_size] rows. Without a table each request has one
// page.
struct CachePages {
  TensorView block_table;  // [B, columns] int32 | int64: page of each page_size slots; null: row b has page b
  int64_t pages = 0;       // of every cache; at least B without a table
  int64_t page_size = 0;   //
  int64_t capacity = 0;    // slots of a request: columns * page_size, less than kMostSlots
};

struct CachePlace {
  int64_t page = -1, row = 0;  // page < 0: there is none
};

// K or V.
struct AppendHalf {
  TensorView rows;   // [B, T, Hk, D], innermost stride 1
  TensorView cache;  // [pages, page_size, Hk, D], innermost stride 1: of the rows' dtype, or float8
  TensorView scale;  // [Hk] float32, by which rows are divided before they become float8; null: 1
};

struct AppendArgs {  // B requests of up to T new rows
  AppendHalf halves[2];
  CachePages pages;      //
  TensorView lengths;    // [B] int32 | int64: row t of request b goes to slot lengths[b] + t
  TensorView num_nodes;  // [B] int32, its first rows that count, none if negative; null: T
  TensorView status;     // [B] int32 out: kBadRow where they do not fit, and none is written
};

// One tensor of a compaction: row r of page p is `parts` runs of `part_bytes` bytes.
struct CacheTensor {
  char* data = nullptr;
  int64_t page_stride = 0, row_stride = 0, part_stride = 0;  // in bytes
  int64_t parts = 0, part_bytes = 0;
};

// What 32 threads move of every row: up to 32 columns of `width` bytes. Nothing else touches those bytes.
struct alignas(16) CacheUnit {
  char* data = nullptr;                                      // of the tensor
  int64_t page_stride = 0, row_stride = 0, part_stride = 0;  // in bytes
  int32_t first = 0, count = 0;                              // columns of the row, over all its parts
  int32_t per_part = 0, width = 0;                           // columns of a part; bytes of a column: 1 .. 16
};

struct CompactArgs {           // B requests, paths of up to D <= kMostPathNodes nodes
  const CacheTensor* tensors;  // [num_tensors] on the host
  int64_t num_tensors;         //
  const CacheUnit* units;      // [num_units] on the device; null on the CPU
  int64_t num_units;           //
  CachePages pages;            //
  TensorView lengths;          // [B] int32 | int64: node i of request b is in slot lengths[b] + i
  TensorView path;             // [B, D] int32 | int64 accepted nodes, ascending from 1
  TensorView num_accepted;     // [B] int32: path[b][i] goes to slot lengths[b] + 1 + i
  TensorView status;           // [B] int32 out: kBadRow where they lie in no slot, and none is moved
};

FORETOKEN_HD inline int64_t integer_at(const TensorView& view, int64_t i, int64_t j = 0) {
  const int64_t at = i * view.strides[0] + (view.rank > 1 ? j * view.strides[1] : 0);
  return view.dtype == DType::int64 ? static_cast<const int64_t*>(view.data)[at]
                                    : static_cast<const int32_t*>(view.data)[at];
}

// The page of the table's column, -1 if it is none of the cache.
FORETOKEN_HD inline int64_t page_at(const CachePages& pages, int64_t b, int64_t column) {
  if (!pages.block_table) return b;
  const int64_t page = integer_at(pages.block_table, b, column);
  return page >= 0 && page < pages.pages ? page : -1;
}

// The table's column of a slot in 0 .. capacity - 1. Divisions of 64 bits are slow on a device.
FORETOKEN_HD inline int64_t column_of(const CachePages& pages, int64_t slot) {
  if (!pages.block_table) return 0;
  return static_cast<uint32_t>(slot) / static_cast<uint32_t>(pages.page_size);
}

FORETOKEN_HD inline CachePlace place_of(const CachePages& pages, int64_t b, int64_t slot) {
  const int64_t column = column_of(pages, slot);
  return {page_at(pages, b, column), slot - column * pages.page_size};
}

// Whether slots length .. length + count - 1 are some of the request's, pages aside.
FORETOKEN_HD inline bool within(const CachePages& pages, int64_t length, int64_t count) {
  return length >= 0 && count <= pages.capacity && length <= pages.capacity - count;
}

}  // namespace foretoken

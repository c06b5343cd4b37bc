// The inner loops of attention over one chunk of slots. Compiled once per instruction set from
// attention_kernels.inl. Arithmetic is float32 throughout, whatever the cache holds: widening is exact, and
// without matrix units float32 products are the fastest ones there are. With them (attention_tiles.inl),
// queries and caches of bfloat16 are multiplied as they are, and so are weights, rounded to bfloat16; sums
// are float32.
//
// What a row (a node and a query head) gets depends on its query and on the columns it sees alone: sums run
// over head elements or columns in ascending order, and a column that is not seen adds an exact zero.
#pragma once

#include "math/half.hpp"
#include "ops/tensor_view.hpp"
#include "ops/tree_attention.hpp"

namespace foretoken::cpu {

constexpr int64_t kRowBlock = 64;                       // rows whose scores are kept at a time: 128 KB
constexpr int64_t kScoreStride = kAttentionChunk + 16;  // so that rows do not share sets of the cache
constexpr int64_t kMaxLanes = 16;  // of a vector of any path; rows of queries and results are padded to it

template <DType dtype>
struct Kind {};  // a dtype as a type, to choose among overloads

constexpr int64_t padded_size(int64_t size) { return (size + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

// What rows have of the chunks they have met: the weighted sum of values over 2^maximum, and the sum of
// weights; nothing but zeros where nothing was seen.
struct PartialRows {
  float* maxima = nullptr;  // [rows], of scores in units of log 2
  float* sums = nullptr;    // [rows]
  float* values = nullptr;  // [rows, padded]
};

struct ChunkScratch {       // of one thread, aligned to 64 bytes
  float* keys = nullptr;    // [kAttentionChunk * padded]
  float* values = nullptr;  // [kAttentionChunk * padded]
  float* scores = nullptr;  // [kRowBlock, kScoreStride]
};

struct ChunkTask {
  const float* queries = nullptr;  // as `arrange` leaves them; scaled, scores come out in units of log 2
  int64_t rows = 0, size = 0, padded = 0;
  DType dtype = DType::float32;         // of the cache
  const void* const* keys = nullptr;    // [columns]: where a column's slot lies
  const void* const* values = nullptr;  // [columns]
  int64_t first = 0, columns = 0;       // columns [first, columns) are there, of kAttentionChunk
  float softcap = 0.0f;                 // in units of log 2; the queries are then divided by it. 0: none
  float factor = 1.0f;                  // of the scores, where kernels scale them
  // All ones where a row sees a column: row r has the line r / group of kAttentionChunk words. Columns
  // [first, mask_from) are seen by every row and have no words. Null: all columns are seen.
  const uint32_t* seen = nullptr;
  int64_t mask_from = 0, group = 1;
  PartialRows out;
};

struct AttentionKernels {
  const char* name;
  void (*attend)(const ChunkTask& task, const ChunkScratch& scratch);
  // out[0..padded) = elements * factor, 0 behind `count`.
  void (*widen)(const void* elements, DType dtype, int64_t count, int64_t padded, float factor, float* out);
  // Rows [rows, padded] in the order that `attend` reads them in.
  void (*arrange)(int64_t rows, int64_t padded, const float* queries, float* out);
  // left = left and right together.
  void (*merge)(int64_t rows, int64_t padded, const PartialRows& left, const PartialRows& right);
  // out[0..count) of dtype = values * factor.
  void (*narrow)(const float* values, int64_t count, float factor, DType dtype, void* out);
  bool scales_scores;  // with ChunkTask::factor; else queries come scaled
};

// What rows of queries take up as `arrange` leaves them, whichever the kernels.
constexpr int64_t query_floats(int64_t rows, int64_t padded) {
  return (rows + 15) / 16 * 16 * ((padded + 31) / 32 * 32);
}

// The path that row_kernels() takes; for bfloat16 the processor's matrix units where it and the system have
// them and FORETOKEN_CPU asks for nothing else.
const AttentionKernels& attention_kernels(DType queries, DType cache);

const char* matrix_kernels();  // the name of what bfloat16 takes then, or "none"

// For tests: "amx", the emulations ("emulated amx", "emulated tiles"), "none", or "auto". False: not here.
bool force_matrix_kernels(const char* name);

// For tests: one product of tiles, as such kernels compute it. False: not here.
bool multiply_tiles(const char* name, const void* left, const void* right, void* sum);

}  // namespace foretoken::cpu

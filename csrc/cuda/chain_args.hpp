// What the verification of plain chains and trees needs of a call, in little enough room to be a kernel's
// parameter. To sample a row is to verify a chain of no drafts, but for the numbers that are drawn and what
// is written down.
#pragma once

#include "math/row_law.hpp"
#include "ops/tile_stats.hpp"
#include "ops/verify.hpp"

namespace foretoken::cuda {

constexpr int kMostChainDrafts = 31;  // a lane for each node
constexpr int32_t kWholeShare = 256;

// A tensor of int32 or int64 with at most two dimensions.
struct Numbers {
  void* data = nullptr;
  int64_t strides[2] = {0, 0};  // in elements
  bool wide = false;            // int64
};

struct ChainRowsView {
  const void* data = nullptr;
  int64_t strides[2] = {0, 0};  // of batch and row, in elements
};

// A law, and the probability of the drafted token under it.
struct alignas(16) ChainRecord {
  RowLaw law;
  double prob;
};

struct ChainArgs {
  ChainRowsView target, draft;  // draft.data == nullptr: no law of the draft's is looked at
  int64_t vocab = 0;
  bool aligned = false;     // all rows begin and end at multiples of 16 bytes
  int32_t most_drafts = 0;  // columns of draft_tokens
  Rule rule = Rule::automatic;
  Numbers draft_tokens, num_drafts, base, slots;
  SamplingView sampling, draft_sampling;
  Numbers tokens, path, num_emitted, num_accepted, next_token, next_lengths, status;
  const TileStats* given =
      nullptr;                 // [B, N + 1, tiles] of the target's rows, which are then not read for them
  int32_t clusters = 1;        // that share the reading of a request
  TileStats* stats = nullptr;  // [B, 2 N + 3, tiles]
  float* lanes = nullptr;  // [B, 2 N + 3, tiles, 32] largest element of each lane, for filters; null: no room
  ChainRecord* laws = nullptr;             // [B, 2 N + 3] of filtered rows, where several clusters find them
  bool prepared = false;                   // laws and stats of all rows are there when this begins
  uint32_t* arrivals = nullptr;            // [B] clusters that are through with their share; 0 between calls
  const int64_t* draft_records = nullptr;  // [B, M, 4] laws of draft, whose rows are then not read for them
  int64_t draft_record_strides[3] = {0, 0, 0};

  // Of trees of drawn drafts alone.
  int32_t law_rows = 0;  // of draft; 0: a chain, or a tree of chosen drafts
  Numbers draft_rows;    // no data: row r for node r
  bool without_replacement = false;
  int32_t requests = 0;
  int32_t helpers = 0;  // clusters before those of the requests, that help to read: see DrawnShape
  int32_t own = kWholeShare;

  // Of trees alone.
  Numbers parents;          // no data: a chain
  Numbers row_offsets;      // no data: T rows a request
  int64_t num_rows = 0;     // of flattened logits
  int32_t first_rows = 1;   // of each request, that are read before anything is decided
  int32_t most_tokens = 0;  // columns of tokens
  Numbers path_rows;

  // Of sampling alone.
  bool samples = false;
  Purpose purpose = Purpose::plain;
  uint32_t step = 0;
  float* logprobs = nullptr;  // may be null
  int64_t logprob_stride = 0;
  int64_t* records = nullptr;  // may be null
  int64_t record_strides[2] = {0, 0};
};

}  // namespace foretoken::cuda

// The queries of a warpgroup for one pair: taken in, what they see, and their results written.
#pragma once

#include "cuda/tree_attention_math.cuh"

namespace foretoken::cuda::attend {

// In shared memory, for each query of a warpgroup.
struct Queries {
  uint64_t words[kTeamRows][kWords];  // nodes it sees
  int32_t from[kTeamRows];            // the first committed slot it sees
};

// The ancestor words of a node as they count: of the row's nodes, and within the window.
struct NodeWords {
  uint64_t words[kWords] = {};
  int depth = -1;

  __device__ NodeWords(const Task& task, int64_t b, int nodes, int node) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int rest = nodes - 64 * i;
      if (rest <= 0) break;
      uint64_t bits = 0;
      if (task.ancestors) {
        bits = static_cast<uint64_t>(
            task.ancestors[b * task.ancestors_row + node * task.ancestors_node + i * task.ancestors_word]);
      } else if (node >= 64 * i) {
        bits = node - 64 * i >= 63 ? ~uint64_t{0} : (uint64_t{2} << (node - 64 * i)) - 1;
      }
      words[i] = rest >= 64 ? bits : bits & ((uint64_t{1} << rest) - 1);
      depth += __popcll(words[i]);
    }
  }

  __device__ void narrow(const Task& task, int64_t b, int nodes) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      for (uint64_t left = words[i]; left != 0; left &= left - 1) {
        const int bit = __ffsll(static_cast<long long>(left)) - 1;
        const NodeWords other(task, b, nodes, 64 * i + bit);
        if (other.depth <= depth - task.window) words[i] &= ~(uint64_t{1} << bit);
      }
    }
  }
};

// What a warpgroup knows of the piece it is at; the same in all its threads.
struct TeamPiece {
  Piece piece;
  RowShape row;
  int first_query;           // of the warpgroup, in the row's nodes x heads of the group
  int queries;               // of the row
  int plain_from, plain_to;  // tiles that every node sees all of

  __device__ bool active() const { return first_query < queries; }
  __device__ bool plain(int tile) const { return tile >= plain_from && tile < plain_to; }
};

__device__ inline TeamPiece team_piece(const Task& task, const Piece& piece, int row_block, int team) {
  TeamPiece at;
  at.piece = piece;
  at.row = row_shape(task, piece.b);
  at.first_query = row_block * task.block_queries + team * kTeamRows;
  at.queries = at.row.nodes * task.group;
  at.plain_to = static_cast<int>(at.row.length / kTile);
  at.plain_from = task.window > 0
                      ? static_cast<int>((max(at.row.slots() - task.window, int64_t{0}) + kTile - 1) / kTile)
                      : 0;
  return at;
}

// Two bfloat16 as halves; what is beyond their range becomes the largest.
__device__ inline uint32_t halves_of_bfloats(uint32_t pair) {
  constexpr float kMost = 65504.0f;
  const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xFFFF0000u);
  return pack<__half>(fabsf(low) > kMost ? copysignf(kMost, low) : low,
                      fabsf(high) > kMost ? copysignf(kMost, high) : high);
}

template <bool kAligned>
__device__ inline uint4 load_piece(const uint16_t* from) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const uint4*>(from);
  } else {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = static_cast<uint32_t>(from[2 * i + 1]) << 16 | static_cast<uint32_t>(from[2 * i]);
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

// What the query of this number among a warpgroup's sees.
__device__ inline void take_sight(const Task& task, const TeamPiece& at, Queries& queries, int number) {
  const int query = at.first_query + number;
  uint64_t* const words = queries.words[number];
  int32_t from = 0;
  for (int i = 0; i < kWords; ++i) words[i] = 0;
  if (query < at.queries) {
    NodeWords node(task, at.piece.b, at.row.nodes, task.node_of(query));
    if (task.window > 0) {
      from = static_cast<int32_t>(max(at.row.length + node.depth - task.window + 1, int64_t{0}));
      if (task.window <= at.row.nodes) node.narrow(task, at.piece.b, at.row.nodes);
    }
    for (int i = 0; i < kWords; ++i) words[i] = node.words[i];
  }
  queries.from[number] = from;
}

__device__ inline uint32_t query_pair(const Task& task, const uint16_t* from) {
  if (__builtin_expect(task.aligned_q, 1)) return *reinterpret_cast<const uint32_t*>(from);
  return static_cast<uint32_t>(from[1]) << 16 | static_cast<uint32_t>(from[0]);
}

// By one warpgroup: its queries, each thread those that it keeps, and what they see, into shared memory.
// Behind it a barrier is due.
template <class Element, int kD>
__device__ void keep_queries(const Task& task, const TeamPiece& at, uint32_t (&kept)[kD / 16][4],
                             Queries& queries, int thread) {
  const auto* const q = static_cast<const uint16_t*>(task.q) + at.piece.b * task.q_row + 2 * (thread % 4);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int query = at.first_query + thread / 32 * 16 + thread % 32 / 4 + 8 * i;
    const int node = task.node_of(query), head = (at.piece.head - node) * task.group + query;
    const uint16_t* const row = q + node * task.q_node + head * task.q_head;
    const int columns = query < at.queries ? task.head_size : 0;
#pragma unroll
    for (int piece = 0; piece < kD / 8; ++piece) {
      kept[piece / 2][piece % 2 * 2 + i] = 8 * piece < columns ? query_pair(task, row + 8 * piece) : 0;
    }
  }
  if (thread < kTeamRows) take_sight(task, at, queries, thread);
  if (std::is_same_v<Element, __half> && task.q_is_bfloat) {
#pragma unroll
    for (int i = 0; i < kD / 4; ++i) kept[i / 4][i % 4] = halves_of_bfloats(kept[i / 4][i % 4]);
  }
}

// By one warpgroup: its queries and what they see, into shared memory. Behind it a barrier is due.
template <class Element, int kD, bool kAligned>
__device__ void take_queries(const Task& task, const TeamPiece& at, char* matrix, Queries& queries,
                             int thread) {
  const auto* const q = static_cast<const uint16_t*>(task.q) + at.piece.b * task.q_row;
  constexpr int kPieces = kD / 8, kEach = kTeamRows * kPieces / kTeam;
  uint4 all[kEach];  // asked for together
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int number = i * kTeam + thread, piece = number % kPieces;
    const int query = at.first_query + number / kPieces;
    all[i] = {};
    if (query < at.queries && piece * 8 < task.head_size) {
      const int node = task.node_of(query), head = (at.piece.head - node) * task.group + query;
      all[i] = load_piece<kAligned>(q + node * task.q_node + head * task.q_head + piece * 8);
    }
  }
  if (thread < kTeamRows) take_sight(task, at, queries, thread);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int number = i * kTeam + thread;
    uint4 raw = all[i];
    if constexpr (std::is_same_v<Element, __half>) {
      if (task.q_is_bfloat) {
        raw = {halves_of_bfloats(raw.x), halves_of_bfloats(raw.y), halves_of_bfloats(raw.z),
               halves_of_bfloats(raw.w)};
      }
    }
    *reinterpret_cast<uint4*>(matrix + place_of(number / kPieces, number % kPieces)) = raw;
  }
}

// Bits of the tile's slots that a query sees.
__device__ inline uint64_t sight_of(const TeamPiece& at, const Queries& queries, int query, int tile) {
  const int64_t begin = static_cast<int64_t>(tile) * kTile, committed = at.row.length - begin;
  uint64_t seen = 0;
  if (committed > 0) {
    seen = committed >= 64 ? ~uint64_t{0} : (uint64_t{1} << committed) - 1;
    const int64_t hidden = min(queries.from[query] - begin, committed);
    if (hidden > 0) seen = hidden >= 64 ? 0 : seen & (~uint64_t{0} << hidden);
    if (committed < 64) seen |= queries.words[query][0] << committed;
    return seen;
  }
  const auto node = static_cast<int>(-committed);
  if (node >= 64 * kWords) return 0;
  seen = queries.words[query][node / 64] >> (node % 64);
  if (node % 64 != 0 && node / 64 + 1 < kWords)
    seen |= queries.words[query][node / 64 + 1] << (64 - node % 64);
  return seen;
}

// One row of a finished result: its denominator, its share of the values.
struct RowResult {
  float factor = 0.0f, lse = 0.0f;

  __device__ RowResult(const Task& task, const Piece& piece, int head, float max, float sum) {
    constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
    float weight = 1.0f;
    if (task.sinks) {
      const float sink = task.sinks[head * task.sinks_head] * kLog2E;
      const float top = fmaxf(max, sink), reference = top == minus_infinity() ? 0.0f : top;
      weight = exp2_fast(max - reference);
      sum = sum * weight + exp2_fast(sink - reference);
      max = top;
    }
    const float scale = task.v_scale ? task.v_scale[piece.head * task.v_scale_head] : 1.0f;
    factor = sum == 0.0f ? 0.0f : __fdiv_rn(weight * scale, sum);
    lse = sum == 0.0f ? minus_infinity() : max * kLn2 + logf(sum);
  }
};

// Writes what a lane has of two rows, in groups of four elements.
template <class Element>
class ResultWriter {
 public:
  __device__ ResultWriter(const Task& task, const TeamPiece& at, int thread, const Rows& rows, bool with_lse)
      : task_(task), columns_(task.head_size - 2 * (thread % 4)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = at.first_query + thread / 32 * 16 + thread % 32 / 4 + 8 * i;
      out_[i] = nullptr;
      factor_[i] = 0.0f;
      if (query >= at.queries) continue;
      const int node = task.node_of(query), head = (at.piece.head - node) * task.group + query;
      const RowResult result(task, at.piece, head, rows.max[i], rows.sum[i]);
      factor_[i] = result.factor;
      out_[i] = static_cast<uint16_t*>(task.out) + at.piece.b * task.out_row + node * task.out_node +
                head * task.out_head + 2 * (thread % 4);
      if (with_lse && task.lse && thread % 4 == 0) {
        task.lse[at.piece.b * task.lse_row + node * task.lse_node + head * task.lse_head] = result.lse;
      }
    }
  }

  __device__ void write(int quad, float a, float b, float c, float d) const {
    if (8 * quad >= columns_) return;
    write_pair(out_[0], quad, a * factor_[0], b * factor_[0]);
    write_pair(out_[1], quad, c * factor_[1], d * factor_[1]);
  }

 private:
  __device__ void write_pair(uint16_t* row, int quad, float a, float b) const {
    if (row == nullptr) return;
    uint32_t pair = 0;
    if constexpr (std::is_same_v<Element, __half>) {
      pair = task_.q_is_bfloat ? pack<__nv_bfloat16>(a, b) : pack<__half>(a, b);
    } else {
      pair = pack<Element>(a, b);
    }
    if (__builtin_expect(task_.aligned_out, 1)) {
      *reinterpret_cast<uint32_t*>(row + 8 * quad) = pair;
    } else {
      row[8 * quad] = static_cast<uint16_t>(pair);
      row[8 * quad + 1] = static_cast<uint16_t>(pair >> 16);
    }
  }

  const Task& task_;
  const int columns_;  // from the lane's first on
  uint16_t* out_[2];
  float factor_[2];
};

}  // namespace foretoken::cuda::attend

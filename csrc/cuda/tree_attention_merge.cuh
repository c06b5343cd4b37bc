// Pairs that several groups of blocks share: their partial results at rest, and how they are put together.
#pragma once

#include "cuda/tree_attention_rows.cuh"

namespace foretoken::cuda::attend {

// Memory of a partial result of one block: for each warpgroup its values, then maximum and sum of each query.
template <int kD, int kTeams>
struct PartialSlot {
  static constexpr int kTeamFloats = kTeamRows * (kD + 2);
  static constexpr int kFloats = kTeams * kTeamFloats;

  float* data;

  __device__ static PartialSlot at(const Task& task, int group, int row_block, int slot) {
    return {task.partials + int64_t{number(task, group, row_block, slot)} * kFloats};
  }
  __device__ static int number(const Task& task, int group, int row_block, int slot) {
    return (group * task.row_blocks + row_block) * task.partial_slots + slot;
  }
  __device__ float4* values(int team, int thread) const {
    return reinterpret_cast<float4*>(data + team * kTeamFloats) + thread;
  }
  // Maximum and sum of the lane's first row, then of its second.
  __device__ float4* rows(int team, int thread) const {
    return reinterpret_cast<float4*>(data + team * kTeamFloats + kTeamRows * kD) + thread / 4;
  }
};

template <int kD, int kTeams>
__device__ void put_partial(const PartialSlot<kD, kTeams>& slot, int team, int thread, Values<kD>& values,
                            const Rows& rows) {
  put_down(values, Resting<false>(slot.values(team, thread)));
  if (thread % 4 == 0) *slot.rows(team, thread) = {rows.max[0], rows.sum[0], rows.max[1], rows.sum[1]};
}

__device__ inline bool begins_segment(int chunk, int first_chunk) {
  return chunk % kSegmentChunks == 0 || chunk == first_chunk;
}
// `chunk`: one behind the last.
__device__ inline bool ends_segment(int chunk, int end_chunk) {
  return chunk % kSegmentChunks == 0 || chunk == end_chunk;
}

// A partial result of a pair, in the order in which they are merged: the number of its slot, and whether a
// segment begins and ends with it.
struct Listed {
  uint32_t bits;

  __device__ static Listed of(int number, bool begins, bool ends) {
    return {static_cast<uint32_t>(number) << 2 | (begins ? 1u : 0u) | (ends ? 2u : 0u)};
  }
  __device__ int64_t number() const { return bits >> 2; }
  __device__ bool begins() const { return (bits & 1u) != 0; }
  __device__ bool ends() const { return (bits & 2u) != 0; }
};

struct Sharing {
  int partials = 0;  // listed
  int arrivals = 0;  // groups that have a piece of the pair
  int mergers = 0;   // of them, groups whose stretch ends with it: they merge
  int rank = 0;      // of this group among the mergers
};

constexpr int kMostListed = 192;  // longer lists are made once the ring is free

struct SharedPair {
  Sharing sharing;
  Listed list[kMostListed];
};

// The last group that begins at tile x of all, or in front of it.
__device__ inline int group_of(const Layout& layout, int groups, int x) {
  int low = 0, high = groups;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (layout.cuts[middle] <= x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Calls `visit(slot, begins, ends)` for what a group leaves of its piece `from` .. `to` of a pair.
template <class Visit>
__device__ void visit_partials(const Task& task, const Piece& pair, int from, int to, const Visit& visit) {
  const int first_chunk = pair.first / kChunkTiles, end_chunk = (pair.end + kChunkTiles - 1) / kChunkTiles;
  const int end = (pair.first + to - pair.pair + kChunkTiles - 1) / kChunkTiles;
  int chunk = (pair.first + from - pair.pair) / kChunkTiles;
  if (from == pair.pair) {
    const int complete = ends_segment(end, end_chunk) ? end : end / kSegmentChunks * kSegmentChunks;
    if (complete > chunk) visit(task.partial_slots - 2, true, true);
    if (complete < end) visit(task.partial_slots - 1, true, false);
    return;
  }
  for (int slot = 0; chunk < end; ++slot) {
    const bool begins = begins_segment(chunk, first_chunk);
    chunk = begins ? min(end, (chunk / kSegmentChunks + 1) * kSegmentChunks) : chunk + 1;
    visit(slot, begins, ends_segment(chunk, end_chunk));
  }
}

// What the groups leave of their pieces of a pair, found by a warp, a group a lane; `most` of it are listed.
__device__ inline Sharing share_pair(const Task& task, const Layout& layout, const Piece& pair, int own,
                                     int row_block, Listed* list, int most) {
  const int stop = pair.pair + pair.end - pair.first, lane = static_cast<int>(threadIdx.x % 32);
  Sharing sharing;
  bool more = true;
  for (int base = group_of(layout, task.groups, pair.pair); more; base += 32) {
    const int group = base + lane;
    const bool begins = group < task.groups && layout.cuts[group] < stop;
    more = __all_sync(0xffffffffu, begins);
    const int from = begins ? max(layout.cuts[group], pair.pair) : 0;
    const int to = begins ? min(layout.cuts[group + 1], stop) : 0;
    const bool shares = from < to;
    const unsigned mergers = __ballot_sync(0xffffffffu, shares && layout.cuts[group + 1] <= stop);
    sharing.arrivals += __popc(__ballot_sync(0xffffffffu, shares));
    const int before = own - base;
    if (before > 0) sharing.rank += __popc(before >= 32 ? mergers : mergers & ((1u << before) - 1));
    sharing.mergers += __popc(mergers);
    int count = 0;
    if (shares) visit_partials(task, pair, from, to, [&](int, bool, bool) { ++count; });
    int place = count;
#pragma unroll
    for (int reach = 1; reach < 32; reach *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, place, reach);
      if (lane >= reach) place += other;
    }
    const int all = __shfl_sync(0xffffffffu, place, 31);
    if (shares) {
      int at = sharing.partials + place - count;
      visit_partials(task, pair, from, to, [&](int slot, bool first, bool last) {
        if (at < most)
          list[at] = Listed::of(PartialSlot<8, 1>::number(task, group, row_block, slot), first, last);
        ++at;
      });
    }
    sharing.partials += all;
  }
  return sharing;
}

// Two rows and some groups of values of a lane, folded as a whole pair's are. A condition chooses between
// results rather than ways, so that a warp need not wait for one fold before it begins the next one's
// exponentials.
template <int kQuads>
struct Fold {
  Rows rows;
  float4 values[kQuads];

  __device__ void put_behind(const Fold& left, bool really) {
    float max[2];
    const Scales first(left.rows.max[0], rows.max[0], max[0]);
    const Scales second(left.rows.max[1], rows.max[1], max[1]);
    const auto fold = [really](const Scales& scales, float a, float& b) {
      const float sum = scales.sum(a, b);
      b = really ? sum : b;
    };
    fold(first, left.rows.sum[0], rows.sum[0]);
    fold(second, left.rows.sum[1], rows.sum[1]);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      fold(first, left.values[i].x, values[i].x);
      fold(first, left.values[i].y, values[i].y);
      fold(second, left.values[i].z, values[i].z);
      fold(second, left.values[i].w, values[i].w);
    }
    rows.max[0] = really ? max[0] : rows.max[0];
    rows.max[1] = really ? max[1] : rows.max[1];
  }
};

// Merges a part of a shared pair's columns, once all its partial results are there.
template <class Element, int kD, int kTeams>
class Merger {
 public:
  using Slot = PartialSlot<kD, kTeams>;

  __device__ Merger(const Task& task, const TeamPiece& at, const Listed* list, int partials, int team,
                    int thread)
      : task_(task), at_(at), list_(list), partials_(partials), team_(team), thread_(thread) {}

  // Maxima and sums are the same whatever the column, and so is what follows from them for a row.
  __device__ void run(int begin, int end) const {
    if (begin >= end) return;
    Rows rows;
    float4 values[kQuads];
    fold(begin, end, rows, values);
    const ResultWriter<Element> writer(task_, at_, thread_, rows, begin == 0);
    for (int quad = begin;;) {
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        if (quad + i < end) writer.write(quad + i, values[i].x, values[i].y, values[i].z, values[i].w);
      }
      quad += kQuads;
      if (quad >= end) return;
      fold(quad, end, rows, values);
    }
  }

 private:
  static constexpr int kAhead = 8, kQuads = 2;  // read at once: memory is far away

  // Of groups `quad` to `quad + kQuads - 1` of the values, as far as they are below `end`.
  __device__ void fold(int quad, int end, Rows& rows, float4 (&values)[kQuads]) const {
    Fold<kQuads> segment, whole;
    bool has_whole = false;
    for (int first = 0; first < partials_; first += kAhead) {
      fold(first, quad, min(quad + 1, end - 1) - quad, segment, whole, has_whole);
    }
    rows = whole.rows;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) values[i] = whole.values[i];
  }

  // Written by other multiprocessors during this launch: past the first-level cache. Behind the last partial
  // result it is read again, for nothing.
  __device__ void fold(int first, int quad, int second, Fold<kQuads>& segment, Fold<kQuads>& whole,
                       bool& has_whole) const {
    Fold<kQuads> ones[kAhead];
    Listed listed[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      listed[i] = list_[min(first + i, partials_ - 1)];
      const Slot slot{task_.partials + listed[i].number() * Slot::kFloats};
      const float4 rows = __ldcg(slot.rows(team_, thread_));
      ones[i].rows = {{rows.x, rows.z}, {rows.y, rows.w}};
      ones[i].values[0] = __ldcg(slot.values(team_, thread_) + quad * kTeam);
      ones[i].values[1] = __ldcg(slot.values(team_, thread_) + (quad + second) * kTeam);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= partials_) break;
      Fold<kQuads>& one = ones[i];
      one.put_behind(segment, !listed[i].begins());
      segment = one;
      if (!listed[i].ends()) continue;
      one.put_behind(whole, has_whole);
      whole = one;
      has_whole = true;
    }
  }

  const Task& task_;
  const TeamPiece& at_;
  const Listed* const list_;
  const int partials_, team_, thread_;
};

}  // namespace foretoken::cuda::attend

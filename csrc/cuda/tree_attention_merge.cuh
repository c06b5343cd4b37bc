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
    const int64_t number = (static_cast<int64_t>(group) * task.row_blocks + row_block) * task.partial_slots;
    return {task.partials + (number + slot) * kFloats};
  }
  __device__ float4* values(int team, int thread) const {
    return reinterpret_cast<float4*>(data + team * kTeamFloats) + thread;
  }
  // Of the lane's first row; the second one is 8 further.
  __device__ float2* row(int team, int thread) const {
    return reinterpret_cast<float2*>(data + team * kTeamFloats + kTeamRows * kD) + thread / 32 * 16 +
           thread % 32 / 4;
  }
};

template <int kD, int kTeams>
__device__ void put_partial(const PartialSlot<kD, kTeams>& slot, int team, int thread, Values<kD>& values,
                            const Rows& rows) {
  put_down(values, slot.values(team, thread));
  if (thread % 4 == 0) {
    slot.row(team, thread)[0] = {rows.max[0], rows.sum[0]};
    slot.row(team, thread)[8] = {rows.max[1], rows.sum[1]};
  }
}

__device__ inline bool begins_segment(int chunk, int first_chunk) {
  return chunk % kSegmentChunks == 0 || chunk == first_chunk;
}
// `chunk`: one behind the last.
__device__ inline bool ends_segment(int chunk, int end_chunk) {
  return chunk % kSegmentChunks == 0 || chunk == end_chunk;
}

// Partial results of a pair in the order in which they are merged: which group's, in which slot, and whether
// a segment begins and ends with it.
struct Listed {
  int16_t group, slot;
  bool begins, ends;
};

constexpr int kListBytes = 16384;

struct Sharing {
  int partials = 0;  // listed
  int arrivals = 0;  // groups that have a piece of the pair
  int mergers = 0;   // of them, groups whose stretch ends with it: they merge
  int rank = 0;      // of this group among the mergers
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

// What the groups leave of their pieces of a pair. Listed by whoever has a list.
__device__ inline Sharing share_pair(const Task& task, const Layout& layout, const Piece& piece, int own,
                                     Listed* list) {
  const int stop = piece.pair + piece.end - piece.first;
  const int first_chunk = piece.first / kChunkTiles, end_chunk = (piece.end + kChunkTiles - 1) / kChunkTiles;
  Sharing sharing;
  for (int group = group_of(layout, task.groups, piece.pair);
       group < task.groups && layout.cuts[group] < stop; ++group) {
    const int from = max(layout.cuts[group], piece.pair), to = min(layout.cuts[group + 1], stop);
    if (from >= to) continue;
    ++sharing.arrivals;
    if (layout.cuts[group + 1] <= stop) {
      if (group == own) sharing.rank = sharing.mergers;
      ++sharing.mergers;
    }
    if (list == nullptr) continue;
    const int end = (piece.first + to - piece.pair + kChunkTiles - 1) / kChunkTiles;
    int chunk = (piece.first + from - piece.pair) / kChunkTiles;
    const auto number = static_cast<int16_t>(group);
    auto slot = static_cast<int16_t>(0);
    if (from == piece.pair) {
      const int complete = ends_segment(end, end_chunk) ? end : end / kSegmentChunks * kSegmentChunks;
      const auto last = static_cast<int16_t>(task.partial_slots);
      if (complete > chunk) list[sharing.partials++] = {number, static_cast<int16_t>(last - 2), true, true};
      if (complete < end) list[sharing.partials++] = {number, static_cast<int16_t>(last - 1), true, false};
      continue;
    }
    while (chunk < end) {
      const bool begins = begins_segment(chunk, first_chunk);
      const int next = begins ? min(end, (chunk / kSegmentChunks + 1) * kSegmentChunks) : chunk + 1;
      list[sharing.partials++] = {number, slot++, begins, ends_segment(next, end_chunk)};
      chunk = next;
    }
  }
  return sharing;
}

// Two rows and a group of values of a lane, folded as a whole pair's are.
struct Fold {
  Rows rows;
  float4 values;

  __device__ void put_behind(const Fold& left) {
    const Scales first(left.rows.max[0], rows.max[0], rows.max[0]);
    const Scales second(left.rows.max[1], rows.max[1], rows.max[1]);
    rows.sum[0] = first.sum(left.rows.sum[0], rows.sum[0]);
    rows.sum[1] = second.sum(left.rows.sum[1], rows.sum[1]);
    values.x = first.sum(left.values.x, values.x);
    values.y = first.sum(left.values.y, values.y);
    values.z = second.sum(left.values.z, values.z);
    values.w = second.sum(left.values.w, values.w);
  }
};

// Merges a part of a shared pair's columns, once all its partial results are there. Each thread copies what
// it needs of as many as its room holds, and waits for them together.
template <class Element, int kD, int kTeams>
class Merger {
 public:
  using Slot = PartialSlot<kD, kTeams>;

  // `room`: 16 bytes for each thread of the warpgroup, one behind the other, `rooms` times.
  __device__ Merger(const Task& task, const TeamPiece& at, const Listed* list, int partials, int row_block,
                    int team, int thread, char* room, int rooms)
      : task_(task),
        at_(at),
        list_(list),
        partials_(partials),
        row_block_(row_block),
        team_(team),
        thread_(thread),
        room_(room + thread * 16),
        rooms_(rooms) {}

  __device__ void run(int begin, int end) {
    const int fit = rooms_ / partials_ - 1;  // groups of values for which there is room beside the rows
    const int quads = max(fit, 1), once = fit >= 1 ? partials_ : rooms_ / 2;
    for (int quad = begin; quad < end; quad += quads) {
      const int stop = min(end, quad + quads);
      for (int first = 0; first < partials_; first += once) {
        const int last = min(partials_, first + once);
        copy(first, last, quad, stop);
        for (int i = quad; i < stop; ++i) fold(first, last, i, i - quad + 1, stop - quad + 1);
      }
    }
  }

 private:
  __device__ char* place(int partial, int part, int parts) const {
    return room_ + static_cast<int64_t>(partial * parts + part) * (kTeam * 16);
  }

  __device__ void copy(int first, int last, int quad, int stop) const {
    const int parts = stop - quad + 1;
    for (int i = first; i < last; ++i) {
      const Slot slot = Slot::at(task_, list_[i].group, row_block_, list_[i].slot);
      const uint32_t rows = shared_address(place(i - first, 0, parts));
      copy8(rows, slot.row(team_, thread_));
      copy8(rows + 8, slot.row(team_, thread_) + 8);
      for (int j = quad; j < stop; ++j) {
        copy16(shared_address(place(i - first, j - quad + 1, parts)),
               slot.values(team_, thread_) + static_cast<int64_t>(j) * kTeam, 16);
      }
    }
    commit_copies();
    wait_copies<0>();
  }

  // Of group `quad` of the values, which is part `part`.
  __device__ void fold(int first, int last, int quad, int part, int parts) {
    for (int i = first; i < last; ++i) {
      const float4 rows = *reinterpret_cast<const float4*>(place(i - first, 0, parts));
      Fold one{{{rows.x, rows.z}, {rows.y, rows.w}},
               *reinterpret_cast<const float4*>(place(i - first, part, parts))};
      const Listed listed = list_[i];
      if (!listed.begins) one.put_behind(segment_);
      segment_ = one;
      if (!listed.ends) continue;
      if (has_whole_) one.put_behind(whole_);
      whole_ = one;
      has_whole_ = true;
    }
    if (last < partials_) return;
    const ResultWriter<Element> writer(task_, at_, thread_, whole_.rows, quad == 0);
    writer.write(quad, whole_.values.x, whole_.values.y, whole_.values.z, whole_.values.w);
    has_whole_ = false;
  }

  const Task& task_;
  const TeamPiece& at_;
  const Listed* const list_;
  const int partials_, row_block_, team_, thread_;
  char* const room_;
  const int rooms_;
  Fold segment_, whole_;
  bool has_whole_ = false;
};

}  // namespace foretoken::cuda::attend

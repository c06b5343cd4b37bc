// Tiles brought to the ring by Hopper's copy engine.
#pragma once

#include "cuda/tree_attention_load.cuh"

namespace foretoken::cuda::attend {

// Caches whose pages hold whole boxes, by the copy engine: the way of one warp through the halves of a
// stretch's tiles, the keys of a tile and then its values. Each warp brings 16 slots of every tile, in one
// box or two for a block of columns: what issues a box takes a while. A lane knows the page of a box, and
// asks for that of the box 32 further on. What a box has beyond the row's slots is hidden or taken out later.
template <int kD, int kElementBytes>
class BoxCursor {
 public:
  static constexpr int kSlots = kTile * 32 / kTeam;
  static constexpr uint32_t kBytes = kSlots * kD * kElementBytes;  // of a half, by one warp

  __device__ BoxCursor(const Task& task, const Layout& layout, const Maps& maps, int start, int stop,
                       int row_block, int thread)
      : task_(task),
        layout_(layout),
        maps_(maps),
        stop_(stop),
        first_query_(row_block * task.block_queries),
        lane_(thread % 32),
        two_(task.boxes * kSlots > kTile ? 1 : 0),
        first_slot_(thread / 32 * kSlots + (lane_ >> two_) * kTile + (lane_ & two_) * (kSlots / 2)),
        x_(start) {
    if (thread == 0) {
      prefetch_map(&maps.k);
      prefetch_map(&maps.v);
    }
    more_ = begin_piece();
  }

  __device__ bool more() const { return more_; }
  // Whether keys are next of which some cannot be read.
  __device__ bool lost() const { return keys_ && (lost_ >> (tile_ << two_) & (1u << two_ | 1u)) != 0; }

  // A row of 64 16-bit columns is 128 bytes, and so far behind the one before; blocks are a tile's apart.
  __device__ void copy(uint32_t to, uint32_t barrier) {
    if (lane_ == 0) barrier_expect(barrier, kBytes);
    if (lane_ >> two_ == tile_) {
      to += static_cast<uint32_t>((lane_ & two_) * (kSlots / 2) * kColumns * kElementBytes);
      const CUtensorMap* const map = keys_ ? &maps_.k : &maps_.v;
#pragma unroll
      for (int block = 0; block < kD / kColumns; ++block) {
        const uint32_t place = to + static_cast<uint32_t>(block * kTile * kColumns * kElementBytes);
        copy_box(place, map, kColumns * block, within_, head_, page_, barrier);
      }
    }
    __syncwarp();
    keys_ = !keys_;
    if (!keys_) return;
    if (--left_ == 0) {
      more_ = begin_piece();
    } else if (++tile_ == 32 >> two_) {
      begin_tiles();
    }
  }

 private:
  static constexpr int kColumns = kElementBytes == 2 ? 64 : kD;  // of a box

  __device__ bool begin_piece() {
    while (x_ < stop_) {
      const Piece piece = piece_at(task_, layout_, x_, stop_);
      x_ += piece.to - piece.from;
      const RowShape row = row_shape(task_, piece.b);
      if (row.nodes * task_.group <= first_query_) continue;
      row_ = piece.b, head_ = piece.head, left_ = piece.to - piece.from;
      begin_ = row.first * kTile, end_ = static_cast<int>(row.slots());
      table_ = task_.block_table ? task_.block_table + piece.b * task_.block_table_row : nullptr;
      slot_ = piece.from * kTile + first_slot_;
      next_ = page_of(slot_);
      begin_tiles();
      return true;
    }
    return false;
  }

  __device__ void begin_tiles() {
    const bool wanted = slot_ >= begin_ && slot_ < end_;
    const bool usable = !wanted || (next_ >= 0 && next_ < task_.pages);
    page_ = wanted && usable ? next_ : task_.pages;  // none: zeros
    within_ = table_ == nullptr ? slot_ : slot_ & (task_.page_size - 1);
    lost_ = __ballot_sync(0xffffffffu, !usable);
    slot_ += (32 >> two_) * kTile;
    next_ = page_of(slot_);
    tile_ = 0;
  }

  __device__ int page_of(int slot) const {
    if (slot < begin_ || slot >= end_) return kNoPage;
    if (table_ == nullptr) return row_;
    return table_[static_cast<int64_t>(slot >> task_.page_shift) * task_.block_table_entry];
  }

  const Task& task_;
  const Layout& layout_;
  const Maps& maps_;
  const int stop_, first_query_, lane_;
  const int two_;  // 1: pages of eight slots, and so two boxes for a warp
  const int first_slot_;
  int x_;
  bool more_ = false, keys_ = true;
  int row_ = 0, head_ = 0, left_ = 0, begin_ = 0, end_ = 0;  // of the piece
  const int32_t* table_ = nullptr;
  int tile_ = 0, page_ = 0, within_ = 0;  // of the tiles that the lanes have
  unsigned lost_ = 0;
  int slot_ = 0, next_ = 0;  // of the tiles behind them
};

// Until the queries are there, which would otherwise stand behind all that the ring can hold.
template <int kTeams>
__device__ void await_queries() {
  sync_threads_of(4 + kTeams, (kTeams + 1) * kTeam);
}

// 16-bit caches by the copy engine.
template <int kD, int kTeams>
__device__ void load_boxes(BoxCursor<kD, 2> cursor, Ring ring, int thread) {
  const int warp = thread / 32;
  const auto place = static_cast<uint32_t>(warp * BoxCursor<kD, 2>::kSlots * 128);
  for (bool first = true; cursor.more(); first = false) {
    barrier_wait(ring.empty_barrier(), ring.parity ^ 1);
    if (thread % 32 == 0) ring.lost_byte(warp) = cursor.lost() ? 1 : 0;
    cursor.copy(ring.buffer() + place, ring.full_barrier());
    ring.advance();
    if (first) await_queries<kTeams>();
  }
}

// Tiles of a stretch that a block walks through.
__device__ inline int tiles_walked(const Task& task, const Layout& layout, int start, int stop,
                                   int row_block) {
  int tiles = 0;
  for (int x = start; x < stop;) {
    const Piece piece = piece_at(task, layout, x, stop);
    x += piece.to - piece.from;
    const int queries = row_shape(task, piece.b).nodes * task.group;
    if (queries > row_block * task.block_queries) tiles += piece.to - piece.from;
  }
  return tiles;
}

}  // namespace foretoken::cuda::attend

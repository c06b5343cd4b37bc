// The warpgroup that fills the ring: a tile of K, that of V, the next tile's, and so on.
#pragma once

#include "cuda/tree_attention_ptx.cuh"
#include "cuda/tree_attention_task.cuh"

namespace foretoken::cuda::attend {

__device__ const uint4 kNotANumber = {~0u, ~0u, ~0u, ~0u};  // in every dtype of a cache

// A matrix of 64 rows of kD 16-bit elements in shared memory: blocks of 64 columns, each 64 rows of 128
// bytes, whose 8 pieces of 16 bytes are permuted by the row's number, as the matrix units expect.
__device__ inline uint32_t place_of(int row, int piece) {
  return static_cast<uint32_t>((piece >> 3) * (kTile * 128) + row * 128 + (((piece & 7) ^ (row & 7)) << 4));
}

// The ring's buffers and barriers. Each side walks through it on its own.
struct Ring {
  uint32_t buffers, full, empty;  // shared memory addresses
  int32_t* lost;                  // of a buffer of K, a byte a warp: not all of it could be read
  int size, bytes;
  int index = 0;
  uint32_t parity = 0;

  __device__ uint32_t buffer() const { return buffers + static_cast<uint32_t>(index * bytes); }
  __device__ uint32_t full_barrier() const { return full + static_cast<uint32_t>(index) * 8; }
  __device__ uint32_t empty_barrier() const { return empty + static_cast<uint32_t>(index) * 8; }
  __device__ uint8_t& lost_byte(int warp) const { return reinterpret_cast<uint8_t*>(lost + index)[warp]; }
  __device__ void advance() {
    if (++index == size) {
      index = 0;
      parity ^= 1;
    }
  }
};

// Where a slot lies. The page is kNoPage where nothing is to be read.
struct Place {
  int page, within;
};

__device__ inline Place locate(const Task& task, int b, int64_t slot, int64_t begin, int64_t end) {
  if (slot < begin || slot >= end) return {kNoPage, 0};
  if (!task.block_table) return {b, static_cast<int>(slot)};
  const auto number = static_cast<uint32_t>(slot), size = static_cast<uint32_t>(task.page_size);
  const uint32_t entry = number / size;
  const int page =
      task.block_table[b * task.block_table_row + static_cast<int64_t>(entry) * task.block_table_entry];
  return {page >= 0 && page < task.pages ? page : kBadPage, static_cast<int>(number - entry * size)};
}

// Threads of the loading warpgroup and what each of them copies of a tile: one piece of 16 bytes in each of
// kPasses rows. The 16 rows of a warp are located by its lanes 0 to 15.
template <int kRowBytes>
struct Pass {
  static constexpr int kPieces = kRowBytes / 16;
  static constexpr int kWarpRows = 32 / kPieces;  // a pass
  static constexpr int kRows = kTeam / kPieces;   // a pass
  static constexpr int kPasses = kTile / kRows;

  int thread, lane, warp;
  __device__ explicit Pass(int number) : thread(number), lane(number % 32), warp(number / 32) {}
  __device__ int piece() const { return thread % kPieces; }
  __device__ int row(int pass) const { return pass * kRows + thread / kPieces; }
  __device__ int located_row() const {  // by this lane, if it is below 16
    return lane % 16 / kWarpRows * kRows + warp * kWarpRows + lane % kWarpRows;
  }
  __device__ int locator(int pass) const { return pass * kWarpRows + lane / kPieces; }
};

// Copies the tiles of one piece. A lane below 16 locates one row of the 16 that its warp copies of a tile: it
// asks the block table one tile ahead, and tells the others.
template <int kRowBytes, int kElementBytes>
class TileReader {
 public:
  static constexpr int kPasses = Pass<kRowBytes>::kPasses;

  __device__ TileReader(const Task& task, int thread)
      : task_(task), pass_(thread), copied_(pass_.piece() * 16 < task.head_size * kElementBytes ? 16 : 0) {}

  // False: no query of this block is in the piece.
  __device__ bool begin(const Piece& piece, int row_block) {
    const RowShape row = row_shape(task_, piece.b);
    if (row.nodes * task_.group <= row_block * task_.block_queries) return false;
    table_ = task_.block_table ? task_.block_table + piece.b * task_.block_table_row : nullptr;
    row_ = piece.b;
    begin_ = row.first * kTile;
    end_ = static_cast<int>(row.slots());
    k_ = task_.k_cache + static_cast<uint64_t>(piece.head) * task_.k_head + pass_.piece();
    v_ = task_.v_cache + static_cast<uint64_t>(piece.head) * task_.v_head + pass_.piece();
    look_up(piece.from);
    return true;
  }

  // On to the tile asked for, and ask for the one behind it.
  __device__ void advance(int tile) {
    const int slot = slot_of_lane(tile);
    const bool wanted = slot >= begin_ && slot < end_;
    const auto number = static_cast<uint32_t>(slot), size = static_cast<uint32_t>(task_.page_size);
    const uint32_t within = table_ == nullptr       ? number
                            : task_.page_shift >= 0 ? number & (size - 1)
                                                    : number % size;
    const bool usable = table_ == nullptr || (entry_ >= 0 && entry_ < task_.pages);
    const auto page = static_cast<uint32_t>(usable ? entry_ : 0);
    k_place_ = static_cast<uint64_t>(page) * task_.k_page + static_cast<uint64_t>(within) * task_.k_slot;
    v_place_ = static_cast<uint64_t>(page) * task_.v_page + static_cast<uint64_t>(within) * task_.v_slot;
    // One piece of NaN makes a score NaN.
    if (!usable) k_place_ = static_cast<uint64_t>(&kNotANumber - (k_ - pass_.piece()));
    v_there_ = __ballot_sync(0xffffffffu, wanted && usable);
    const unsigned all = __ballot_sync(0xffffffffu, wanted);
    k_there_ = pass_.piece() == 0 ? all : v_there_;
    look_up(tile + 1);
  }

  __device__ void copy_k(uint32_t to, const uint32_t (&places)[kPasses]) const {
    copy(k_, k_place_, k_there_, to, places);
  }
  __device__ void copy_v(uint32_t to, const uint32_t (&places)[kPasses]) const {
    copy(v_, v_place_, v_there_, to, places);
  }
  __device__ const Pass<kRowBytes>& pass() const { return pass_; }

 private:
  __device__ int slot_of_lane(int tile) const { return tile * kTile + pass_.located_row(); }

  __device__ void look_up(int tile) {
    const int slot = slot_of_lane(tile);
    entry_ = row_;
    if (table_ == nullptr || slot < begin_ || slot >= end_) return;
    const auto number = static_cast<uint32_t>(slot);
    const uint32_t entry =
        task_.page_shift >= 0 ? number >> task_.page_shift : number / static_cast<uint32_t>(task_.page_size);
    entry_ = table_[entry * task_.block_table_entry];
  }

  __device__ void copy(const uint4* cache, uint64_t place, unsigned there, uint32_t to,
                       const uint32_t (&places)[kPasses]) const {
    const uint4* from[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int locator = pass_.locator(i);
      const uint64_t offset = __shfl_sync(0xffffffffu, place, locator);
      from[i] = cache + ((there >> locator & 1u) != 0 ? offset : 0);
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      copy16(to + places[i], from[i], (there >> pass_.locator(i) & 1u) != 0 ? copied_ : 0);
    }
  }

  const Task& task_;
  const Pass<kRowBytes> pass_;
  const uint32_t copied_;
  const int32_t* table_ = nullptr;
  int row_ = 0, begin_ = 0, end_ = 0, entry_ = 0;
  const uint4 *k_ = nullptr, *v_ = nullptr;
  uint64_t k_place_ = 0, v_place_ = 0;
  unsigned k_there_ = 0, v_there_ = 0;
};

// 16-bit caches: copied to where they are used.
template <int kD>
__device__ void load_tiles(const Task& task, const Layout& layout, int start, int stop, int row_block,
                           Ring ring, int thread) {
  using Reader = TileReader<2 * kD, 2>;
  Reader reader(task, thread);
  uint32_t places[Reader::kPasses];
#pragma unroll
  for (int i = 0; i < Reader::kPasses; ++i) {
    places[i] = place_of(reader.pass().row(i), reader.pass().piece());
  }
  for (int x = start; x < stop;) {
    const Piece piece = piece_at(task, layout, x, stop);
    x += piece.to - piece.from;
    if (!reader.begin(piece, row_block)) continue;
    for (int tile = piece.from; tile < piece.to; ++tile) {
      reader.advance(tile);
      for (int i = 0; i < 2; ++i) {
        barrier_wait(ring.empty_barrier(), ring.parity ^ 1);
        if (i == 0) {
          reader.copy_k(ring.buffer(), places);
        } else {
          reader.copy_v(ring.buffer(), places);
        }
        barrier_arrive_behind_copies(ring.full_barrier());
        ring.advance();
      }
    }
  }
}

}  // namespace foretoken::cuda::attend

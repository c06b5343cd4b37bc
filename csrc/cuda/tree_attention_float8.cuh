// 8-bit tiles on their way to the ring.
#pragma once

#include <cuda_fp8.h>

#include "cuda/tree_attention_boxes.cuh"

namespace foretoken::cuda::attend {

// 8-bit caches: copied to a stage and on to the ring as halves, which hold every such number.
template <int kD, int kStages, int kTeams>
class Float8Loader {
 public:
  using Reader = TileReader<kD, 1>;
  using Cursor = BoxCursor<kD, 1>;
  static constexpr int kStageBytes = kTile * kD;

  // `full`: barriers, one for each stage and warp.
  __device__ Float8Loader(const Task& task, const Ring& ring, char* stages, uint32_t full, int thread)
      : task_(task), ring_(ring), stages_(stages), full_(full), thread_(thread) {}

  // By the copy engine, each warp for itself. Threads' own copies would be waited for together with what the
  // matrix units are to see.
  __device__ void load_boxes(Cursor cursor, int halves) {
    const int warp = thread_ / 32, lane = thread_ % 32;
    char* const own = stages_ + warp * static_cast<int>(Cursor::kBytes);
    const uint32_t full = full_ + static_cast<uint32_t>(warp) * 8;
    unsigned lost = 0;  // stages
    const auto copy = [&](int stage) {
      lost = cursor.lost() ? lost | 1u << stage : lost & ~(1u << stage);
      cursor.copy(shared_address(own) + static_cast<uint32_t>(stage * kStageBytes),
                  full + static_cast<uint32_t>(stage) * 32);
    };
    for (int i = 0; i < kStages && cursor.more(); ++i) {
      copy(i);
      if (i == 0) await_queries<kTeams>();
    }
    uint32_t parity = 0;
    for (int i = 0, stage = 0; i < halves; ++i) {
      barrier_wait(full + static_cast<uint32_t>(stage) * 32, parity);
      constexpr int kRows = 32 / Pass<kD>::kPieces;
      convert<32, kRows>(own + stage * kStageBytes + lane * 16,
                         warp * Cursor::kSlots + lane / Pass<kD>::kPieces, lost >> stage & 1u);
      __syncwarp();
      if (cursor.more()) copy(stage);
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }

  // By all threads: each finds in the stage what it has copied itself.
  __device__ void load(const Layout& layout, int start, int stop, int row_block) {
    Reader reader(task_, thread_);
    uint32_t places[Reader::kPasses];
#pragma unroll
    for (int i = 0; i < Reader::kPasses; ++i) places[i] = static_cast<uint32_t>((i * kTeam + thread_) * 16);
    for (int x = start; x < stop;) {
      const Piece piece = piece_at(task_, layout, x, stop);
      x += piece.to - piece.from;
      if (!reader.begin(piece, row_block)) continue;
      for (int tile = piece.from; tile < piece.to; ++tile) {
        reader.advance(tile);
        reader.copy_k(shared_address(stage(copied_)), places);
        follow();
        reader.copy_v(shared_address(stage(copied_)), places);
        follow();
      }
    }
    while (converted_ < copied_) {
      commit_copies();
      wait_copies<kStages - 1>();
      if (++drained_ + copied_ >= kStages) convert_own();
    }
  }

 private:
  __device__ char* stage(int number) const { return stages_ + number % kStages * kStageBytes; }

  __device__ void follow() {
    commit_copies();
    if (++copied_ < kStages) return;
    wait_copies<kStages - 1>();
    convert_own();
  }

  __device__ void convert_own() {
    convert<kTeam, Pass<kD>::kRows>(stage(converted_++) + thread_ * 16, thread_ / Pass<kD>::kPieces, 0);
  }

  // A piece of a row, and others kThreads pieces and kRows rows apart.
  template <int kThreads, int kRows>
  __device__ void convert(const char* from, int row, unsigned lost) {
    uint4 raw[Reader::kPasses];
#pragma unroll
    for (int i = 0; i < Reader::kPasses; ++i)
      raw[i] = *reinterpret_cast<const uint4*>(from + i * kThreads * 16);
    barrier_wait(ring_.empty_barrier(), ring_.parity ^ 1);
    if (task_.float8_e5m2) {
      store_halves<kRows, true>(raw, row);
    } else {
      store_halves<kRows, false>(raw, row);
    }
    if (thread_ % 32 == 0) ring_.lost_byte(thread_ / 32) = static_cast<uint8_t>(lost);
    publish_to_matrix_units();
    barrier_arrive(ring_.full_barrier());
    ring_.advance();
  }

  template <int kRows, bool kE5M2>
  __device__ void store_halves(const uint4 (&raw)[Reader::kPasses], int row) const {
    const int piece = thread_ % Pass<kD>::kPieces;
    const bool swap = piece % 8 >= 4;  // else two threads of a warp would meet in a bank
#pragma unroll
    for (int i = 0; i < Reader::kPasses; ++i) {
      const uint4 low{pair_of<kE5M2>(raw[i].x, 0), pair_of<kE5M2>(raw[i].x, 1), pair_of<kE5M2>(raw[i].y, 0),
                      pair_of<kE5M2>(raw[i].y, 1)};
      const uint4 high{pair_of<kE5M2>(raw[i].z, 0), pair_of<kE5M2>(raw[i].z, 1), pair_of<kE5M2>(raw[i].w, 0),
                       pair_of<kE5M2>(raw[i].w, 1)};
      store(place_of(row + i * kRows, 2 * piece + (swap ? 1 : 0)), swap ? high : low);
      store(place_of(row + i * kRows, 2 * piece + (swap ? 0 : 1)), swap ? low : high);
    }
  }

  __device__ void store(uint32_t place, const uint4& value) const {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(ring_.buffer() + place), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
  }

  template <bool kE5M2>
  static __device__ uint32_t pair_of(uint32_t word, int upper) {
    if constexpr (kE5M2) return __byte_perm(word, 0, upper != 0 ? 0x3424 : 0x1404);
    const auto bytes = static_cast<__nv_fp8x2_storage_t>(upper != 0 ? word >> 16 : word & 0xFFFFu);
    const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(bytes, __NV_E4M3);
    return static_cast<uint32_t>(pair.y) << 16 | pair.x;
  }

  const Task& task_;
  Ring ring_;
  char* const stages_;
  const uint32_t full_;
  const int thread_;
  int copied_ = 0, converted_ = 0, drained_ = 0;
};

}  // namespace foretoken::cuda::attend

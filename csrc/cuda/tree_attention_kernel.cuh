// The kernel: a warpgroup that loads, one or two that compute, each for 64 queries.
#pragma once

#include "cuda/tree_attention_float8.cuh"
#include "cuda/tree_attention_merge.cuh"

namespace foretoken::cuda::attend {

// Whether registers can be handed from those that load to those that compute; only devices that can do that
// have shared memory for more than the ring. Code for the host has to ask the device.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kIsHopper = false;
#else
constexpr bool kIsHopper = true;
#endif

// Sizes and places in a block's shared memory.
template <int kD, int kTeams, bool kFloat8>
struct SharedPlan {
  static constexpr int kBufferBytes = kTile * kD * 2;  // a tile of K or V; a warpgroup's queries
  static constexpr int kTotalBytes = kTeamRows * kD * 4;
  static constexpr bool kSharesTotals = kIsHopper && kD == 128;  // else they are in memory
  static constexpr int kStages = !kFloat8 ? 0 : kD == 256 ? 4 : kTeams == 1 ? 8 : 6;
  static constexpr int kStageBytes = kStages * kTile * kD;
  static constexpr int kMostBuffers = 16;
  // Few queries keep a multiprocessor busy only in two blocks, which take turns at waiting.
  static constexpr int kBlocksAtOnce = kIsHopper && kTeams == 1 && kD == 128 && !kFloat8 ? 2 : 1;
  static constexpr bool kGivesRegisters = kTeams == 2 || kBlocksAtOnce == 2;
  static constexpr int kLoaderRegisters = kFloat8 ? 72 : 40;
  static constexpr int kTeamRegisters = kTeams == 1 ? 216 : kFloat8 ? 216 : 232;
  static constexpr int kBarrierBytes = kMostBuffers * (16 + 4) + kStages * 32;  // and what is lost

  static constexpr int64_t query_bytes(bool hopper) {
    return keeps_queries(kD, hopper) ? 0 : kTeams * kBufferBytes;
  }
  static int64_t total_bytes(bool hopper) { return hopper && kSharesTotals ? kTeams * kTotalBytes : 0; }
  static int64_t bytes(int buffers, int batch, int groups, bool hopper) {
    return 1024 + query_bytes(hopper) + total_bytes(hopper) + static_cast<int64_t>(buffers) * kBufferBytes +
           kStageBytes + kBarrierBytes + kTeams * static_cast<int64_t>(sizeof(Queries)) + 16 +
           static_cast<int64_t>(sizeof(SharedPair)) + 4 * (batch + 1) + 4 * (groups + 2);
  }
};

// Where two blocks share a multiprocessor, those that it is given first and those that join them have
// neighbouring stretches: short caches leave every second stretch empty.
template <int kBlocksAtOnce>
__device__ inline int group_of_block(const Task& task) {
  const int group = static_cast<int>(blockIdx.x) / task.row_blocks, half = task.groups / 2;
  if (kBlocksAtOnce == 1 || group >= 2 * half) return group;
  return group < half ? 2 * group + 1 : 2 * (group - half);
}

// A warpgroup that computes, on its way through the block's stretch.
template <class Element, int kD, int kTeams, bool kFloat8>
class Consumer {
 public:
  using Product = Products<Element, kD>;
  using Slot = PartialSlot<kD, kTeams>;

  __device__ Consumer(const Task& task, const Layout& layout, const Ring& ring, char* matrix,
                      Queries& queries, const SharedPair& shared, uint64_t& unfit, float4* totals, int team,
                      int thread)
      : task_(task),
        layout_(layout),
        ring_(ring),
        matrix_(matrix),
        queries_(queries),
        shared_(shared),
        unfit_(unfit),
        totals_(totals),
        team_(team),
        thread_(thread),
        group_(group_of_block<SharedPlan<kD, kTeams, kFloat8>::kBlocksAtOnce>(task)),
        row_block_(static_cast<int>(blockIdx.x) % task.row_blocks) {}

  __device__ void run(int start, int stop) {
    bool merges = false;
    for (int x = start; x < stop;) {
      const Piece piece = piece_at(task_, layout_, x, stop);
      x += piece.to - piece.from;
      const TeamPiece at = team_piece(task_, piece, row_block_, team_);
      if (at.queries <= row_block_ * task_.block_queries) continue;
      sync_team();
      typename Product::Queries queries;
      queries.matrix = shared_address(matrix_);
      if constexpr (Product::kKeepsQueries) {
        keep_queries<Element, kD>(task_, at, queries.kept, queries_, thread_);
      } else if (__builtin_expect(task_.aligned_q, 1)) {
        take_queries<Element, kD, true>(task_, at, matrix_, queries_, thread_);
      } else {
        take_queries<Element, kD, false>(task_, at, matrix_, queries_, thread_);
      }
      if (!Product::kKeepsQueries) publish_to_matrix_units();
      if (task_.boxes > 0 && !taken_) arrive_at(4 + kTeams, (kTeams + 1) * kTeam);
      taken_ = true;
      sync_team();
      walk(at, queries);
      if (piece.whole()) continue;
      arrive(piece);
      merges = x >= stop;
    }
    if (merges) merge(piece_at(task_, layout_, stop - 1, stop));
  }

 private:
  __device__ void sync_team() const { sync_threads_of(1 + team_, kTeam); }
  __device__ void sync_teams() const { sync_threads_of(1 + kTeams, kTeams * kTeam); }

  __device__ Slot slot(int number) const { return Slot::at(task_, group_, row_block_, number); }

  // What has been folded of a piece: chunks of the segment at hand, and segments from the pair's first one
  // on.
  struct Folded {
    Rows segment, whole;
    bool has_segment = false, has_whole = false;
    int slots = 0;
  };

  // All tiles of a piece. The scores of a tile and the values of the one before it are begun together, so
  // that the matrix units have work while scores become weights. Of the values at first and the scores at
  // last nothing is used: products under a condition would have to wait for each other.
  __device__ void walk(const TeamPiece& at, const typename Product::Queries& queries) {
    const Piece& piece = at.piece;
    if (!at.active()) return pass_by(at);
    const ScoreScale scale(
        task_.k_scale ? task_.scale * task_.k_scale[piece.head * task_.k_scale_head] : task_.scale,
        task_.softcap);
    const int start = piece.from;
    Values<kD> values;
    Rows rows, done;
    Folded folded;
    float scores[32], factors[2];
    uint32_t weights[16] = {};
    rows.clear();
    for (int tile = start;; ++tile) {
      const bool scored = tile<piece.to, valued = tile> start;
      const bool begins = tile % kChunkTiles == 0 || !valued;  // a chunk
      const bool alone = tile - 1 == start || (tile - 1) % kChunkTiles == 0;
      const Ring before = ring_;  // the values of the tile before
      if (valued) ring_.advance();
      const Ring keys = ring_;
      bool lost = false;
      if (scored) {
        await_tile(ring_);
        lost = ring_.lost[ring_.index] != 0;
        ring_.advance();
      }
      Product::settle(scores);
      Product::begin();
      Product::add_scores(scores, queries, keys.buffer());
      Product::commit();
      if (valued) await_values(at, tile - 1, before, rows);
      Product::settle(values);
      Product::begin();
      Product::add_values(values, weights, before.buffer(), alone);
      Product::commit();
      if (begins || !scored) {
        done = rows;
        rows.clear();
      }
      Product::template wait<1>();
      Product::settle(scores);
      if (scored) {
        release(keys);
        float factor = scale.factor;
        if (__builtin_expect(lost || !scale.plain || !at.plain(tile), 0)) {
          factor = scores_of(scores, scale);
          if (lost) lose_rows(at, tile, rows);
          if (!at.plain(tile)) hide(scores, sight(at, 0, tile), sight(at, 1, tile));
        }
        weigh(scores, factor, rows, factors);
      }
      Product::template wait<0>();
      Product::settle(values);
      if (valued) {
        release(before);
      }
      if (scored) add_weights(scores, factors, rows);
      pack_weights<Element>(scores, weights);
      if (begins || !scored) {
        if (valued) end_chunk(at, (tile - 1) / kChunkTiles, values, done, folded);
        if (!scored) return;
      } else {
        scale_values(values, factors);
      }
    }
  }

  // Rows that see anything of a tile that could not be read.
  __device__ void lose_rows(const TeamPiece& at, int tile, Rows& rows) const {
    for (int i = 0; i < 2; ++i) {
      if (sight(at, i, tile) != 0) rows.sum[i] = __int_as_float(0x7fffffff);
    }
  }

  // Folds a chunk into its segment and a segment into the pair, as far as the piece has them from their
  // beginnings on; else they go to memory.
  __device__ void end_chunk(const TeamPiece& at, int chunk, Values<kD>& values, Rows& rows, Folded& folded) {
    const Piece& piece = at.piece;
    const int first_chunk = piece.first / kChunkTiles,
              end_chunk = (piece.end + kChunkTiles - 1) / kChunkTiles;
    const bool last = (chunk + 1) * kChunkTiles >= piece.to, ends = ends_segment(chunk + 1, end_chunk);
    rows.finish();
    if (begins_segment(chunk, first_chunk)) {
      folded.has_segment = true;
    } else if (folded.has_segment) {
      put_behind(values, rows, totals_, folded.segment);
    }
    if (folded.has_segment && !ends && !last) {
      put_down(values, totals_);
      folded.segment = rows;
      return;
    }
    if (!piece.begins()) {
      put_partial(slot(folded.slots++), team_, thread_, values, rows);
      return;
    }
    const Slot whole = slot(task_.partial_slots - 2);
    if (!ends) {
      put_partial(slot(task_.partial_slots - 1), team_, thread_, values, rows);
      return;
    }
    if (folded.has_whole) {
      put_behind(values, rows, Resting<false>(whole.values(team_, thread_)), folded.whole);
    }
    if (last && piece.whole()) {
      write(at, values, rows);
      return;
    }
    put_partial(whole, team_, thread_, values, rows);
    folded.whole = rows;
    folded.has_whole = true;
  }

  __device__ void write(const TeamPiece& at, Values<kD>& values, const Rows& rows) const {
    const ResultWriter<Element> writer(task_, at, thread_, rows, true);
#pragma unroll
    for (int i = 0; i < Values<kD>::kQuads; ++i) {
      const float* const quad = values.quad(i);
      writer.write(i, quad[0], quad[1], quad[2], quad[3]);
    }
  }

  // Of the lane's first or second row.
  __device__ uint64_t sight(const TeamPiece& at, int row, int tile) const {
    return sight_of(at, queries_, thread_ / 32 * 16 + thread_ % 32 / 4 + 8 * row, tile);
  }

  __device__ void await_tile(const Ring& ring) const {
    barrier_wait(ring.full_barrier(), ring.parity);
    if (!kFloat8 && task_.boxes == 0) publish_to_matrix_units();  // else that has been done
  }
  __device__ void release(const Ring& ring) const {
    __syncwarp();  // behind what the others have read
    if (thread_ % 32 == 0) barrier_arrive(ring.empty_barrier());
  }

  // The tiles of a piece that has no queries for this warpgroup.
  __device__ void pass_by(const TeamPiece& at) {
    Rows rows;
    for (int tile = at.piece.from; tile < at.piece.to; ++tile) {
      await_tile(ring_);
      release(ring_);
      ring_.advance();
      await_values(at, tile, ring_, rows);
      release(ring_);
      ring_.advance();
    }
  }

  // A weight of 0 does not keep infinity or NaN out of a sum. In tiles that not every node sees whole, such
  // values are taken out, and the rows that see them are lost.
  __device__ void await_values(const TeamPiece& at, int tile, const Ring& ring, Rows& rows) {
    await_tile(ring);
    if (at.plain(tile)) return;
    constexpr uint32_t kHigh = std::is_same_v<Element, __half> ? 0x7C007C00u : 0x7F807F80u;
    constexpr uint32_t kCarry = std::is_same_v<Element, __half> ? 0x04000400u : 0x00800080u;
    uint4* const words = reinterpret_cast<uint4*>(matrix_ + (ring.buffer() - shared_address(matrix_)));
    bool found = false;
#pragma unroll 4
    for (int i = team_ * kTeam + thread_; i < kTile * kD / 8; i += kTeams * kTeam) {
      const uint4 word = words[i];
      const uint32_t hits = ((word.x & kHigh) + kCarry) | ((word.y & kHigh) + kCarry) |
                            ((word.z & kHigh) + kCarry) | ((word.w & kHigh) + kCarry);
      if (__builtin_expect((hits & 0x80008000u) == 0, 1)) continue;
      found = true;
      words[i] = {};
      atomicOr(reinterpret_cast<unsigned long long*>(&unfit_), 1ull << (i / 8 % kTile));
    }
    publish_to_matrix_units();
    if (__builtin_expect(!any_of_threads(1 + kTeams, kTeams * kTeam, found), 1)) return;
    const uint64_t unfit = unfit_;
    sync_teams();
    unfit_ = 0;
    sync_teams();
    for (int i = 0; i < 2; ++i) {
      if ((sight(at, i, tile) & unfit) != 0) rows.sum[i] = __int_as_float(0x7fffffff);
    }
  }

  __device__ bool leads() const { return team_ == 0 && thread_ == 0; }
  // Two for a pair, at the group that begins it: it cannot begin two that it does not end.
  __device__ uint32_t* counters(const Piece& piece) const {
    const int group = group_of(layout_, task_.groups, piece.pair);
    return task_.counters + 2 * (group * task_.row_blocks + row_block_);
  }

  // Behind a piece of a shared pair: its partial results are there.
  __device__ void arrive(const Piece& piece) const {
    sync_teams();
    if (!leads()) return;
    __threadfence();
    atomicAdd(counters(piece), 1u);
  }

  // Blocks whose stretch ends with a shared pair wait for all that have a piece of it, and merge. Those with
  // more to do had that piece first of all, so that nobody waits for a block that waits.
  __device__ void merge(const Piece& piece) {
    const TeamPiece at = team_piece(task_, piece, row_block_, team_);
    sync_threads_of(2 + kTeams, kTeams * kTeam + 32);  // with the warp that has found out who shares the pair
    const Sharing sharing = shared_.sharing;
    const Listed* list = shared_.list;
    if (sharing.partials > kMostListed) {
      // The ring is done with.
      auto* const long_list = reinterpret_cast<Listed*>(matrix_ + (ring_.buffers - shared_address(matrix_)));
      if (team_ == 0 && thread_ < 32) {
        share_pair(task_, layout_, piece, group_, row_block_, long_list, sharing.partials);
      }
      list = long_list;
    }
    uint32_t* const counters = this->counters(piece);
    if (leads()) {
      while (load_acquire(counters) < static_cast<uint32_t>(sharing.arrivals)) {
      }
      __threadfence();
    }
    sync_teams();
    const auto mergers = static_cast<unsigned>(sharing.mergers);
    if (leads() && atomicInc(counters + 1, mergers - 1) + 1 == mergers) *counters = 0;
    if (!at.active()) return;
    constexpr int kQuads = Values<kD>::kQuads;
    Merger<Element, kD, kTeams>(task_, at, list, sharing.partials, team_, thread_)
        .run(sharing.rank * kQuads / sharing.mergers, (sharing.rank + 1) * kQuads / sharing.mergers);
  }

  const Task& task_;
  const Layout& layout_;
  Ring ring_;
  bool taken_ = false;  // the first queries
  char* const matrix_;
  Queries& queries_;
  const SharedPair& shared_;
  uint64_t& unfit_;  // slots of a tile
  const Resting<SharedPlan<kD, kTeams, kFloat8>::kSharesTotals> totals_;
  const int team_, thread_, group_, row_block_;
};

// By a warp, while others compute: who shares the pair that a stretch ends with, unless that is all its own.
template <int kTeams>
__device__ void tell_who_shares(const Task& task, const Layout& layout, int start, int stop, int row_block,
                                int group, SharedPair& shared) {
  if (start >= stop) return;
  const Piece last = piece_at(task, layout, stop - 1, stop);
  if (start <= last.pair && stop >= last.pair + last.end - last.first) return;
  if (row_shape(task, last.b).nodes * task.group <= row_block * task.block_queries) return;
  const Sharing sharing = share_pair(task, layout, last, group, row_block, shared.list, kMostListed);
  if (threadIdx.x % 32 == 0) shared.sharing = sharing;
  arrive_at(2 + kTeams, kTeams * kTeam + 32);
}

// Nodes that do not exist, and rows that cannot be served, by one warpgroup.
__device__ inline void fill_rest(const Task& task, int thread) {
  for (int64_t b = blockIdx.x; b < task.batch; b += gridDim.x) {
    const RowShape row = row_shape(task, b);
    const int from = row.usable ? row.nodes : 0, heads = task.group * task.kv_heads;
    const uint16_t bits = row.usable ? 0 : 0x7FFF;  // NaN in either dtype
    const int64_t results = static_cast<int64_t>(task.nodes - from) * heads;
    for (int64_t i = thread / 32; i < results; i += kTeam / 32) {
      const int64_t node = from + i / heads, head = i % heads;
      auto* const out =
          static_cast<uint16_t*>(task.out) + b * task.out_row + node * task.out_node + head * task.out_head;
      for (int d = thread % 32; d < task.head_size; d += 32) out[d] = bits;
      if (task.lse && thread % 32 == 0) {
        task.lse[b * task.lse_row + node * task.lse_node + head * task.lse_head] =
            row.usable ? minus_infinity() : __int_as_float(0x7fffffff);
      }
    }
  }
}

template <class Element, int kD, int kTeams, bool kFloat8>
__global__ void __launch_bounds__((kTeams + 1) * kTeam, (SharedPlan<kD, kTeams, kFloat8>::kBlocksAtOnce))
    tree_attention_kernel(const __grid_constant__ Task task, const __grid_constant__ Maps maps) {
  using Plan = SharedPlan<kD, kTeams, kFloat8>;
  extern __shared__ char raw[];
  char* const shared = raw + (1024 - shared_address(raw) % 1024) % 1024;
  constexpr auto kQueryBytes = static_cast<int>(Plan::query_bytes(kHasWarpgroups));
  char* const buffers = shared + kQueryBytes;
  char* const stages = buffers + task.ring * Plan::kBufferBytes;
  char* const totals = Plan::kSharesTotals
                           ? stages + Plan::kStageBytes
                           : reinterpret_cast<char*>(task.totals) +
                                 static_cast<int64_t>(blockIdx.x) * kTeams * Plan::kTotalBytes;
  char* const barriers = stages + Plan::kStageBytes + (Plan::kSharesTotals ? kTeams * Plan::kTotalBytes : 0);
  auto* const queries = reinterpret_cast<Queries*>(barriers + Plan::kBarrierBytes);
  auto* const unfit = reinterpret_cast<uint64_t*>(queries + kTeams);
  Layout layout;
  auto* const shared_pair = reinterpret_cast<SharedPair*>(unfit + 2);
  layout.before = reinterpret_cast<int32_t*>(shared_pair + 1);
  layout.cuts = layout.before + task.batch + 1;
  layout.filled = layout.cuts + task.groups + 1;
  Ring ring;
  ring.buffers = shared_address(buffers);
  ring.full = shared_address(barriers);
  ring.empty = ring.full + Plan::kMostBuffers * 8;
  ring.lost = reinterpret_cast<int32_t*>(barriers + Plan::kMostBuffers * 16);
  ring.size = task.ring;
  ring.bytes = Plan::kBufferBytes;
  const uint32_t stages_full = ring.full + Plan::kMostBuffers * 20;
  if (threadIdx.x == 0) {
    *unfit = 0;
    for (int i = 0; i < task.ring; ++i) {
      ring.lost[i] = 0;
      barrier_init(ring.full + i * 8, task.boxes > 0 && !kFloat8 ? kTeam / 32 : kTeam);
      barrier_init(ring.empty + i * 8, kTeams * kTeam / 32);
    }
    for (int i = 0; i < Plan::kStages * 4; ++i) barrier_init(stages_full + static_cast<uint32_t>(i) * 8, 1);
  }
  lay_out(task, layout);  // with barriers of the block
  const int group = group_of_block<Plan::kBlocksAtOnce>(task);
  const int row_block = static_cast<int>(blockIdx.x) % task.row_blocks;
  const int start = layout.cuts[group], stop = layout.cuts[group + 1];
  const int team = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kTeam, 0);
  const int thread = static_cast<int>(threadIdx.x) % kTeam;
  if (team == kTeams) {
    if constexpr (Plan::kGivesRegisters) leave_registers<Plan::kLoaderRegisters>();
    if constexpr (kFloat8) {
      Float8Loader<kD, Plan::kStages, kTeams> loader(task, ring, stages, stages_full, thread);
      if (kHasCopyEngine && task.boxes > 0) {
        loader.load_boxes({task, layout, maps, start, stop, row_block, thread},
                          2 * tiles_walked(task, layout, start, stop, row_block));
      } else {
        loader.load(layout, start, stop, row_block);
      }
    } else if (kHasCopyEngine && task.boxes > 0) {
      load_boxes<kD, kTeams>({task, layout, maps, start, stop, row_block, thread}, ring, thread);
    } else {
      load_tiles<kD>(task, layout, start, stop, row_block, ring, thread);
    }
    if (thread < 32) tell_who_shares<kTeams>(task, layout, start, stop, row_block, group, *shared_pair);
    fill_rest(task, thread);
  } else {
    if constexpr (Plan::kGivesRegisters) take_registers<Plan::kTeamRegisters>();
    auto* const own = reinterpret_cast<float4*>(totals + team * Plan::kTotalBytes);
    Consumer<Element, kD, kTeams, kFloat8>(task, layout, ring, shared + team * (kQueryBytes / kTeams),
                                           queries[team], *shared_pair, *unfit, own + thread, team, thread)
        .run(start, stop);
  }
}

}  // namespace foretoken::cuda::attend

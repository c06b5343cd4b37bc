// Verification of trees of drawn drafts. As of chains: a cluster takes a request, or several share the
// reading of its rows and the last of them goes on alone; every block decides the same for itself.
#pragma once

#include "cuda/chain_draw.cuh"
#include "cuda/drawn_walk.cuh"

namespace foretoken::cuda {

template <DType kType>
class DrawnVerifier : ChainDraw<kType, false, true> {
 public:
  __device__ __forceinline__ DrawnVerifier(const ChainArgs& args, ChainShared& shared) : Base(args, shared) {}

  __device__ __forceinline__ void run() {
    const bool scouts = rank_ == 0 && warp_ == 0, given = args_.given != nullptr;
    const uint32_t clusters = static_cast<uint32_t>(args_.clusters);
    const auto tiles_of_rows = [&](int32_t count) {
      return RowTiles((warp_ * size_ + rank_) * clusters + part_ - clusters,
                      size_ * kWarps * clusters - clusters, 0, 1, static_cast<uint32_t>(count), tiles_);
    };
    // The first row, before it is known which others are read.
    RowTiles tiles = tiles_of_rows(given ? 0 : 1);
    RawTile<kType> raw;
    const bool begins = !scouts && tiles.any();
    if (begins) this->load(tiles.row(), tiles.index(), raw);
    if (!this->read_header()) {
      if (part_ == 0 && rank_ == 0) write_drawn_tree(args_, tree(), b_, -1, status_, false);
      return;
    }
    const bool filtered = this->any_filter(), takes_given = given && !filtered;
    plan_rows(args_, tree(), b_, drafts_, dense_, !filtered && !given, takes_given);
    tiles = tiles_of_rows(tree().num_rows);
    if (!scouts && !begins && tiles.any()) this->load(this->row_of(tiles), tiles.index(), raw);
    if (scouts) {
      look_ahead_at_tree(args_, tree().nodes, kType, b_, *this->seed_, drafts_, usable_, dense_);
    } else {
      this->stream(raw, tiles);
    }
    if (takes_given) this->take_given();  // thresholds are found in the rows
    if (!this->goes_on()) return;
    if (rank_ != 0) copy_nodes();
    if (filtered) {
      make_filtered_laws();
    } else {
      this->make_laws();
    }
    cluster_sync();
    if (warp_ == 0) walk(-1);
    int turn = 0;
    while (true) {
      __syncthreads();
      const ChainStep step = shared_.step;
      if (step.close) return close(step);
      if (tree().sums) this->sum_residual(step, ++turn);
      if (tree().reads) make_law(static_cast<uint32_t>(step.node));
      if (tree().left_row >= 0) count_left();
      cluster_sync();
      if (warp_ == 0) walk(turn);
    }
  }

 private:
  using Base = ChainDraw<kType, false, true>;
  using typename Base::Rows;
  using RowTiles = typename Rows::RowTiles;
  using Base::args_;
  using Base::b_;
  using Base::dense_;
  using Base::drafts_;
  using Base::part_;
  using Base::rank_;
  using Base::row_data;
  using Base::shared_;
  using Base::size_;
  using Base::stats;
  using Base::status_;
  using Base::tiles_;
  using Base::usable_;
  using Base::vocab_;
  using Base::warp_;

  __device__ __forceinline__ DrawnTree& tree() const { return this->drawn_tree(); }
  __device__ __forceinline__ TileStats* left_stats() const {  // behind those of all rows
    return stats(static_cast<uint32_t>(2 * args_.most_drafts + 2));
  }
  __device__ __forceinline__ void walk(int turn) {
    walk_drawn_tree(args_, shared_, tree(), turn, left_stats());
  }

  // Of the first block.
  __device__ __forceinline__ void copy_nodes() {
    static_assert(sizeof(DrawnNodes) % sizeof(uint4) == 0);
    uint4* const nodes = reinterpret_cast<uint4*>(&tree().nodes);
    const uint4* const first = of_block(nodes, 0);
    for (uint32_t i = threadIdx.x; i < sizeof(DrawnNodes) / sizeof(uint4); i += kThreads) nodes[i] = first[i];
  }

  // Filters that came when this had been captured without any: rows one by one, by all blocks. Calls whose
  // tables have some are the general kernel's.
  __device__ __forceinline__ void make_filtered_laws() {
#pragma unroll 1
    for (uint32_t row = 0; row < this->rows(); ++row) {
      if (!this->is_wanted(row)) continue;
      const Filters& filters = shared_.filters[this->of_target(row) ? 0 : 1];
      make_filtered_law(this->task_of(row), filters, shared_, row);
    }
  }
  static __device__ __noinline__ void make_filtered_law(const RowTask& task, const Filters& filters,
                                                        ChainShared& shared, uint32_t row) {
    RowLaw law = law_of_stats(task);
    if (law.usable && law.kind == LawKind::logits && filters.any(task.row.size)) {
      cluster_sync();  // the statistics have been looked at
      ClusterFilter(task, shared.filter).run(filters, law);
      law.mass = mass_of_row(task.stats, tiles_of(task.row.size), law);
    }
    if (threadIdx.x == 0) shared.records[row].law = law;
  }

  // Of a row that was left out at first: none is where there are filters.
  __device__ __forceinline__ void make_law(uint32_t row) {
    const RowTask task = this->task_of(row);
#pragma unroll 1
    for (uint32_t index = warp_ * size_ + rank_; index < tiles_; index += size_ * kWarps) {
      float lane_max;
      const TileStats found = stats_slowly(task.row, task.reading, index, lane_max);
      if (lane_id() == 0) *reinterpret_cast<float2*>(stats(row) + index) = make_float2(found.max, found.sum);
    }
    cluster_sync();
    if (warp_ != 0) return;
    const RowLaw law = law_of_stats(task);
    if (lane_id() == 0) shared_.records[row].law = law;
  }

  __device__ __forceinline__ void count_left() {
    cluster_sync();  // what was left before has been looked at
    const uint32_t row = this->law_row(tree().left_row);
    count_what_is_left(tree(), {row_data(row), kType, vocab_}, shared_.records[row].law, left_stats());
  }

  __device__ __forceinline__ void close(const ChainStep& step) {
    const SeveralRemoved removed{tree().removed, tree().num_removed};
    const int64_t token = this->closing_token(step, tree().turn, removed);
    if (rank_ == 0) write_drawn_tree(args_, tree(), b_, token, step.status, true);
  }
};

}  // namespace foretoken::cuda

// Verification of plain chains and of trees of drawn drafts, and sampling of plain rows: no edits of logits,
// laws as logits or none. A cluster takes a request, or several share the reading of its rows and the last of
// them goes on alone. Each row's law is made by one warp; from the laws every block decides the same for
// itself, so nobody has to be told what to do next.
//
// Most of what follows the reading is done once, by few threads, and takes as long as its instructions are
// many: hence the inlining, the work dealt out to idle warps, and no structure that would live in memory.
#pragma once

#include "cuda/chain_draw.cuh"
#include "cuda/chain_walk.cuh"

namespace foretoken::cuda {

template <DType kType>
class ChainVerifier : ChainWalk<ChainDraw<kType, false>> {
 public:
  __device__ __forceinline__ ChainVerifier(const ChainArgs& args, ChainShared& shared) : Base(args, shared) {}

  __device__ __forceinline__ void run() {
    const bool scouts = rank_ == 0 && warp_ == 0;
    const uint32_t clusters = static_cast<uint32_t>(args_.clusters);
    const bool given = args_.given != nullptr;
    const bool tree = this->is_drawn_tree();
    const uint32_t of_target = static_cast<uint32_t>(args_.most_drafts) + 1, first = given ? of_target : 0;
    const uint32_t end = of_target + (args_.draft.data ? static_cast<uint32_t>(args_.most_drafts) : 0);
    const auto tiles_from = [&](uint32_t row, uint32_t count) {
      return typename Rows::RowTiles((warp_ * size_ + rank_) * clusters + part_ - clusters,
                                     size_ * kWarps * clusters - clusters, row, row + 1, count, tiles_);
    };
    // Of a tree the first row, before it is known which others are read.
    typename Rows::RowTiles tiles = tiles_from(first, !tree ? end - first : given ? 0 : 1);
    RawTile<kType> raw;
    const bool begins = !scouts && !args_.prepared && tiles.any();
    if (begins) this->load(tiles.row(), tiles.index(), raw);
    if (args_.stats == nullptr) cluster_sync();  // nobody's memory is written before everybody runs
    if (!this->read_header()) {
      if (part_ == 0 && rank_ == 0) write(0, -1, status_, 0);
      return;
    }
    const bool filtered = !args_.prepared && this->any_filter();
    if (tree) {
      plan_rows(args_, this->drawn_tree(), b_, drafts_, dense_, !filtered && !given, given && !filtered);
      tiles = tiles_from(0, static_cast<uint32_t>(this->drawn_tree().num_rows));
      if (!scouts && !begins && tiles.any()) this->load(this->row_of(tiles), tiles.index(), raw);
    }
    if (scouts && tree) {
      look_ahead_at_tree(args_, this->drawn_tree().nodes, kType, b_, *this->seed_, drafts_, usable_, dense_);
    } else if (scouts) {
      this->look_ahead();
    } else if (!filtered && !args_.prepared) {
      this->stream(raw, tiles);
    }
    if (given && !filtered) this->take_given();  // thresholds are found in the rows
    if (filtered) this->make_own_laws();
    if (!this->goes_on()) return;
    if (tree && rank_ != 0) copy_nodes();
    if (warp_ == 0 && !tree) this->node_ = *of_block(&shared_.nodes[lane_id()], 0);
    if (args_.prepared || (filtered && args_.clusters > 1)) {
      this->take_laws();
    } else if (!filtered) {
      this->make_laws();
    }
    cluster_sync();
    if (warp_ == 0) tree ? this->walk_tree(-1) : this->begin();
    int turn = 0;
    while (true) {
      __syncthreads();
      const ChainStep step = shared_.step;
      if (step.close) return close(step, turn);
      if (!tree || this->drawn_tree().sums) this->sum_residual(step, ++turn);
      if (tree) this->look_closer(step.node);
      cluster_sync();
      if (warp_ != 0) continue;
      if (tree) {
        this->walk_tree(turn);
      } else {
        this->go_on([&](int32_t which) { return this->summed_mass(turn, which); });
      }
    }
  }

 private:
  using Base = ChainWalk<ChainDraw<kType, false>>;
  using Base::args_;
  using Base::b_;
  using Base::dense_;
  using Base::draft_row;
  using Base::drafts_;
  using Base::element;
  using Base::greedy_;
  using Base::part_;
  using Base::rank_;
  using Base::shared_;
  using Base::size_;
  using Base::stats;
  using Base::status_;
  using Base::tiles_;
  using Base::usable_;
  using Base::vocab_;
  using Base::warp_;
  using typename Base::Rows;

  // Of the first block.
  __device__ __forceinline__ void copy_nodes() {
    static_assert(sizeof(DrawnNodes) % sizeof(uint4) == 0);
    uint4* const nodes = reinterpret_cast<uint4*>(&this->drawn_tree().nodes);
    const uint4* const first = of_block(nodes, 0);
    for (uint32_t i = threadIdx.x; i < sizeof(DrawnNodes) / sizeof(uint4); i += kThreads) nodes[i] = first[i];
  }

  __device__ __forceinline__ void close(const ChainStep& step, int turn) {
    SeveralRemoved removed{&shared_.removed, step.removed >= 0 ? 1 : 0};
    if (threadIdx.x == 0) shared_.removed = {step.removed_mass, static_cast<int32_t>(step.removed)};
    if (this->is_drawn_tree()) {
      removed = {this->drawn_tree().removed, this->drawn_tree().num_removed};
      turn = this->drawn_tree().turn;
    }
    const int64_t token = this->closing_token(step, turn, removed);
    if (rank_ == 0) write(step.node, token, step.status, step.node + 1);
    if (args_.stats == nullptr) cluster_sync();  // the others may still read the first block's memory
  }

  // `emitted`: the drafts that are kept and the closing token; 0: nothing is. By a block, a warp for each
  // output.
  __device__ __forceinline__ void write(int32_t last, int64_t closing, int32_t status,
                                        int32_t emitted) const {
    if (args_.samples) {
      if (lane_id() == 0) this->write_sample(warp_, closing, status);
    } else if (this->is_drawn_tree()) {
      write_drawn_tree(args_, this->drawn_tree(), b_, closing, status, emitted > 0);
    } else if (warp_ == 0) {
      this->write_tokens(last, closing, emitted);
    } else if (lane_id() == 0) {
      this->write_output(warp_, last, closing, status, emitted);
    }
  }
};

}  // namespace foretoken::cuda

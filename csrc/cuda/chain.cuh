// Verification of plain chains, and sampling of plain rows: no tree, no edits of logits, laws as logits or
// none. A cluster takes a request, or several share the reading of its rows and the last of them goes on
// alone. Each row's law is made by one warp; from the laws every block decides the same for itself, so nobody
// has to be told what to do next.
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
    const uint32_t of_target = static_cast<uint32_t>(args_.most_drafts) + 1, first = given ? of_target : 0;
    const uint32_t end = of_target + (args_.draft.data ? static_cast<uint32_t>(args_.most_drafts) : 0);
    typename Rows::RowTiles tiles((warp_ * size_ + rank_) * clusters + part_ - clusters,
                                  size_ * kWarps * clusters - clusters, first, first + 1, end - first,
                                  tiles_);
    RawTile<kType> raw;
    if (!scouts && tiles.any()) this->load(tiles, raw);
    if (args_.stats == nullptr) cluster_sync();  // nobody's memory is written before everybody runs
    if (!this->read_header()) {
      if (part_ == 0 && rank_ == 0) write(0, -1, status_, 0);
      return;
    }
    const bool filtered = this->any_filter();
    if (scouts) {
      this->look_ahead();
    } else if (!filtered) {
      this->stream(raw, tiles);
    }
    if (given && !filtered) this->take_given();  // thresholds are found in the rows
    if (filtered) this->make_own_laws();
    if (!this->goes_on()) return;
    if (warp_ == 0) this->node_ = *of_block(&shared_.nodes[lane_id()], 0);
    if (!filtered) {
      this->make_laws();
    } else if (args_.clusters > 1) {
      this->take_laws();
    }
    cluster_sync();
    if (warp_ == 0) this->begin();
    int turn = 0;
    while (true) {
      __syncthreads();
      const ChainStep step = shared_.step;
      if (step.close) return close(step, turn);
      this->sum_residual(step, ++turn);
      cluster_sync();
      if (warp_ == 0) this->go_on([&](int32_t which) { return this->summed_mass(turn, which); });
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

  __device__ __forceinline__ void close(const ChainStep& step, int turn) {
    const int64_t token = this->closing_token(step, turn, OneRemoved{step.removed, step.removed_mass});
    if (rank_ == 0) write(step.node, token, step.status, step.node + 1);
    if (args_.stats == nullptr) cluster_sync();  // the others may still read the first block's memory
  }

  // By a block, a warp for each output.
  __device__ __forceinline__ void write(int32_t last, int64_t closing, int32_t status,
                                        int32_t emitted) const {
    if (args_.samples) {
      if (lane_id() == 0) this->write_sample(warp_, closing, status);
    } else if (warp_ == 0) {
      this->write_tokens(last, closing, emitted);
    } else if (lane_id() == 0) {
      this->write_output(warp_, last, closing, status, emitted);
    }
  }
};

}  // namespace foretoken::cuda

// Verification of trees of drawn drafts. As of chains: a cluster takes a request, others may help it to read
// its rows, and then it goes on alone; every block decides the same for itself.
#pragma once

#include "cuda/chain_draw.cuh"
#include "cuda/drawn_walk.cuh"

namespace foretoken::cuda {

template <DType kType>
class DrawnVerifier : ChainDraw<kType, false, true> {
 public:
  __device__ __forceinline__ DrawnVerifier(const ChainArgs& args, ChainShared& shared) : Base(args, shared) {}

  __device__ __forceinline__ void run() {
    const int32_t cluster = static_cast<int32_t>(blockIdx.x / size_), owned = cluster - args_.helpers;
    int32_t first = owned, last = owned;
    if (owned < 0) {
      first = cluster * args_.requests / args_.helpers;
      last = ((cluster + 1) * args_.requests - 1) / args_.helpers;
    }
    bool goes_on = false;
#pragma unroll 1
    for (int32_t request = first; request <= last; ++request) goes_on = read(request, owned >= 0);
    if (owned < 0 || !goes_on) return;
    wait_for_helpers();
    verify();
  }

 private:
  using Base = ChainDraw<kType, false, true>;
  using typename Base::Rows;
  using RowTiles = typename Rows::RowTiles;
  using Base::args_;
  using Base::b_;
  using Base::dense_;
  using Base::drafts_;
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

  // This cluster's share of a request's rows. False: nothing is emitted.
  __device__ __forceinline__ bool read(int32_t request, bool owns) {
    b_ = request;
    this->stats_ = args_.stats + b_ * (2 * args_.most_drafts + 3) * tiles_;
    const bool scouts = rank_ == 0 && warp_ == 0, given = args_.given != nullptr;
    const auto tiles_of_rows = [&](uint32_t first, uint32_t end) {
      return RowTiles(warp_ * size_ + rank_ - 1, size_ * kWarps - 1, first, first + 1, end - first, tiles_);
    };
    // The first row, before it is known which others are read.
    RowTiles tiles = tiles_of_rows(0, owns && !given ? 1 : 0);
    RawTile<kType> raw;
    const bool begins = !scouts && tiles.any();
    if (begins) this->load(tiles.row(), tiles.index(), raw);
    if (!this->read_header()) {
      if (owns && rank_ == 0) write_drawn_tree(args_, tree(), b_, -1, status_, false);
      return false;
    }
    const bool filtered = this->any_filter(), takes_given = given && !filtered;
    plan_rows(args_, tree(), b_, drafts_, this->reads_laws(), !filtered && !given, takes_given);
    const RowRange share = share_of(owns);
    tiles = tiles_of_rows(share.begin, share.end);
    if (!scouts && !begins && tiles.any()) this->load(this->row_of(tiles), tiles.index(), raw);
    if (!scouts) {
      this->stream(raw, tiles);
    } else if (owns) {
      look_ahead_at_tree(args_, tree().nodes, kType, b_, *this->seed_, drafts_, usable_, dense_);
    }
    if (takes_given && owns) this->take_given();  // thresholds are found in the rows
    if (owns) return true;
    cluster_sync();
    if (rank_ == 0 && threadIdx.x == 0) add_in_order(args_.arrivals + b_, 1u);
    return true;
  }

  struct RowRange {
    uint32_t begin, end;  // of the rows in the list
  };
  __device__ __forceinline__ RowRange share_of(bool owns) const {
    const uint32_t rows = static_cast<uint32_t>(tree().num_rows);
    if (args_.helpers == 0) return {0, rows};
    const uint32_t own = (rows * static_cast<uint32_t>(args_.own) + kWholeShare / 2) / kWholeShare;
    if (owns) return {0, own};
    // A request's rest is as long as there are helpers, and a helper's share as there are requests.
    const auto place = [&](int32_t of_helper) {
      const int32_t at = of_helper * args_.requests - static_cast<int32_t>(b_) * args_.helpers;
      const uint32_t inside = static_cast<uint32_t>(at < 0 ? 0 : at > args_.helpers ? args_.helpers : at);
      return own + (rows - own) * inside / static_cast<uint32_t>(args_.helpers);
    };
    const int32_t helper = static_cast<int32_t>(blockIdx.x / size_);
    return {place(helper), place(helper + 1)};
  }

  // They wait for nobody, and come first in the grid: whoever waits for them keeps none from running.
  __device__ __forceinline__ void wait_for_helpers() {
    if (args_.helpers > 0 && rank_ == 0 && threadIdx.x == 0) {
      const int32_t begin = static_cast<int32_t>(b_) * args_.helpers, end = begin + args_.helpers;
      const int32_t helpers = (end + args_.requests - 1) / args_.requests - begin / args_.requests;
      uint32_t* const arrivals = args_.arrivals + b_;
      while (read_in_order(arrivals) != static_cast<uint32_t>(helpers)) __nanosleep(20);
      *arrivals = 0;
    }
    cluster_sync();
  }

  // All rows that are read at first have been.
  __device__ __forceinline__ void verify() {
    const bool filtered = this->any_filter();
    if (rank_ != 0) copy_nodes();
    if (dense_ && args_.draft_records != nullptr) take_records();
    if (filtered) {
      make_filtered_laws();
    } else {
      this->make_laws();
    }
    cluster_sync();
    if (warp_ == 0) walk(-1);
    __syncthreads();
    go_to_end();
  }

  // From step to step. In one place residuals are added up, for whoever wants it: it is a lot of code.
  __device__ __forceinline__ void go_to_end() {
    ChainStep step = shared_.step;
    SeveralRemoved removed{tree().removed, tree().num_removed};
    int64_t token;
    int turn = 0, summed = tree().turn;  // turns so far, and the one whose masses a step that closes has
#pragma unroll 1
    while (true) {
      const bool sums = step.close ? this->wants_masses(step) : tree().sums;
      if (sums) {
        this->sum_residual(step, ++turn);
        step.summed = true;
        summed = turn;
      }
      if (!step.close) {
        if (tree().reads) make_law(static_cast<uint32_t>(step.node));
        if (tree().left_row >= 0) count_left();
      }
      if (sums || !step.close) cluster_sync();
      if (!step.close) {
        if (warp_ == 0) walk(turn);
        __syncthreads();
        step = shared_.step;
        summed = tree().turn;
        removed.count = tree().num_removed;
      } else if (this->closes(step, summed, removed, token)) {
        break;
      }
    }
    cluster_show_up();
    if (rank_ == 0) write_drawn_tree(args_, tree(), b_, token, step.status, true);
    cluster_wait();  // others may still read this block's memory
  }

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

  // The laws that drafts were drawn from, from whoever drew.
  __device__ __forceinline__ void take_records() {
    const int32_t row = kThreads - 1 - static_cast<int32_t>(threadIdx.x);  // the first warps make laws
    if (row >= args_.law_rows) return;
    const int64_t* const strides = args_.draft_record_strides;
    shared_.records[this->draft_row(row)].law =
        read_record(args_.draft_records + b_ * strides[0] + row * strides[1], strides[2], vocab_);
  }

  // With filters, behind the reading: each block takes a row at a time, as far as few of its elements matter;
  // the rest are left to all of them. Top-p alone comes here only if it came when this had been captured.
  __device__ __forceinline__ void make_filtered_laws() {
#pragma unroll 1
    for (uint32_t row = rank_; row < this->rows(); row += size_) {
      if (this->is_wanted(row)) list_row(this->task_of(row), filters_of(row), shared_, tree(), row);
    }
    cluster_sync();
#pragma unroll 1
    for (uint32_t row = 0; row < this->rows(); ++row) {
      if (this->is_wanted(row) && tree().unsolved[row])
        solve_together(this->task_of(row), filters_of(row), shared_, row);
    }
  }
  __device__ __forceinline__ const Filters& filters_of(uint32_t row) const {
    return shared_.filters[this->of_target(row) ? 0 : 1];
  }

  static __device__ __noinline__ void list_row(const RowTask& task, const Filters& filters,
                                               ChainShared& shared, DrawnTree& tree, uint32_t row) {
    RowLaw law = law_of_stats(task);
    bool solved = true;
    __syncthreads();
    if (law.usable && law.kind == LawKind::logits && filters.any(task.row.size)) {
      solved = BlockFilter(task, shared.filter).list(filters, law);
      if (solved) law.mass = mass_of_row(task.stats, tiles_of(task.row.size), law);
    }
    __syncthreads();
    if (threadIdx.x >= cluster_size()) return;
    of_block(&shared.records[row], threadIdx.x)->law = law;
    *of_block(&tree.unsolved[row], threadIdx.x) = !solved;
  }
  static __device__ __noinline__ void solve_together(const RowTask& task, const Filters& filters,
                                                     ChainShared& shared, uint32_t row) {
    RowLaw law = law_of_stats(task);
    cluster_sync();  // the statistics have been looked at
    ClusterFilter(task, shared.filter).run(filters, law);
    law.mass = mass_of_row(task.stats, tiles_of(task.row.size), law);
    if (threadIdx.x == 0) shared.records[row].law = law;
  }

  // Of a row that was left out at first: none is where there are filters.
  __device__ __forceinline__ void make_law(uint32_t row) {
#pragma unroll 1
    for (uint32_t index = warp_ * size_ + rank_; index < tiles_; index += size_ * kWarps) {
      RawTile<kType> raw;
      this->load(row, index, raw);
      this->leave_stats(row, index, raw);
    }
    cluster_sync();
    if (warp_ != 0) return;
    const RowLaw law = this->law_of(row);
    if (lane_id() == 0) shared_.records[row].law = law;
  }

  __device__ __forceinline__ void count_left() {
    cluster_sync();  // what was left before has been looked at
    const uint32_t row = this->law_row(tree().left_row);
    count_what_is_left(tree(), {row_data(row), kType, vocab_}, shared_.records[row].law, left_stats());
  }
};

}  // namespace foretoken::cuda

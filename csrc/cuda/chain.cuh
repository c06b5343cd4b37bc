// Verification of plain chains, and sampling of plain rows: no tree, no edits of logits, laws as logits or
// none. A cluster takes a request, or several share the reading of its rows and the last of them goes on
// alone. Each row's law is made by one warp; from the laws every block decides the same for itself, so nobody
// has to be told what to do next.
//
// Most of what follows the reading is done once, by few threads, and takes as long as its instructions are
// many: hence the inlining, the work dealt out to idle warps, and no structure that would live in memory.
#pragma once

#include "cuda/chain_rows.cuh"

namespace foretoken::cuda {

template <DType kType>
class ChainVerifier : ChainRows<kType> {
 public:
  __device__ __forceinline__ ChainVerifier(const ChainArgs& args, ChainShared& shared) : Rows(args, shared) {}

  __device__ __forceinline__ void run() {
    const bool scouts = rank_ == 0 && warp_ == 0;
    const uint32_t clusters = static_cast<uint32_t>(args_.clusters);
    typename Rows::RowTiles tiles((warp_ * size_ + rank_) * clusters + part_ - clusters,
                                  size_ * kWarps * clusters - clusters, *this);
    RawTile<kType> raw;
    if (!scouts && tiles.any()) tiles.load(raw);
    if (args_.stats == nullptr) cluster_sync();  // nobody's memory is written before everybody runs
    if (!this->read_header()) {
      if (part_ == 0 && rank_ == 0) write(0, -1, status_, 0);
      return;
    }
    scouts ? this->look_ahead() : this->stream(raw, tiles);
    if (!this->goes_on()) return;
    if (warp_ == 0) node_ = *of_block(&shared_.nodes[lane_id()], 0);
    this->make_laws();
    cluster_sync();
    if (warp_ == 0) begin();
    int turn = 0;
    while (true) {
      __syncthreads();
      const ChainStep step = shared_.step;
      if (step.close) return close(step, turn);
      sum_residual(step, ++turn);
      cluster_sync();
      if (warp_ == 0) go_on(shared_.draw.sums[turn % 2]);
    }
  }

 private:
  using Rows = ChainRows<kType>;
  using Rows::args_;
  using Rows::b_;
  using Rows::dense_;
  using Rows::draft_row;
  using Rows::drafts_;
  using Rows::element;
  using Rows::greedy_;
  using Rows::part_;
  using Rows::rank_;
  using Rows::row_data;
  using Rows::shared_;
  using Rows::size_;
  using Rows::stats;
  using Rows::status_;
  using Rows::tiles_;
  using Rows::usable_;
  using Rows::vocab_;
  using Rows::warp_;

  __device__ __forceinline__ bool walks_up() const {
    return !greedy_ && drafts_ > 0 &&
           (args_.rule == Rule::traversal || (args_.rule == Rule::automatic && dense_));
  }

  // The first step. By the first warp of each block, whose lanes know their nodes from here on.
  __device__ __forceinline__ void begin() {
    const int32_t node = lane_id();
    const bool drafted = node >= 1 && node <= drafts_;
    bool sound = true;
    target_prob_ = 0.0;
    draft_prob_ = 1.0;
    if (drafted) {
      sound = node_.token >= 0;
      target_prob_ = shared_.records[node - 1].prob;
      if (dense_) {
        const ChainRecord& record = shared_.records[draft_row(node - 1)];
        draft_prob_ = record.prob;
        sound = sound && record.law.usable && draft_prob_ > 0.0 && draft_prob_ < 1.001;
      }
    }
    // Judged before any coin, so that dropping the proposal changes no law.
    sound = __all_sync(kAllLanes, sound) != 0 && usable_;
    if (!sound) status_ |= kBadDraft;
    length_ = sound ? drafts_ : 0;
    const unsigned lawless =
        __ballot_sync(kAllLanes, node <= length_ && !shared_.records[node <= length_ ? node : 0].law.usable);
    end_ = lawless != 0 ? __ffs(static_cast<int>(lawless)) - 1 : length_;
    if (walks_up()) return walk_up();
    const bool accepted = drafted && node <= length_ && accepts_token(node_.coin, target_prob_, draft_prob_);
    const unsigned kept = __ballot_sync(kAllLanes, accepted) >> 1;
    const int32_t run = __ffs(static_cast<int>(~kept)) - 1;
    close_at(run < end_ ? run : end_, 1.0, false);
  }

  // Block verification, "Block verification accelerates speculative decoding" (Sun et al. 2024, algorithm 2):
  // walk_traversal() of math/tree_walk.hpp on a chain.
  __device__ __forceinline__ void walk_up() {
    const int32_t node = lane_id();
    double prefix = 1.0;
    prefix_ = 1.0;
#pragma unroll 1
    for (int32_t i = 1; i <= end_; ++i) {
      prefix = extend_prefix(prefix, __shfl_sync(kAllLanes, target_prob_, i),
                             __shfl_sync(kAllLanes, draft_prob_, i));
      if (node == i) prefix_ = prefix;
    }
    // The coin already decides for most: no fraction is larger than the prefix, but for rounding.
    const double bound = node == end_ || prefix_ == 1.0 ? prefix_ : 1.001 * prefix_;
    candidates_ = __ballot_sync(kAllLanes, node >= 1 && node <= end_ && accepts_fraction(node_.coin, bound));
    next_candidate();
  }

  // Whether what a rejected draft leaves of a row takes two rows to tell.
  __device__ __forceinline__ bool has_residuals() const {
    return dense_ && shared_.records[draft_row(0)].law.kind == LawKind::logits;
  }

  __device__ __forceinline__ void next_candidate() {
#pragma unroll 1
    while (candidates_ != 0) {
      const int32_t at = 31 - __clz(static_cast<int>(candidates_));
      const double prefix = __shfl_sync(kAllLanes, prefix_, at);
      if (at == end_ || prefix == 1.0) break;
      if (has_residuals()) return then({false, false, at, status_, 1.0 / prefix, -1, 0, -1, 0});
      if (passes(at, left_of_point(at))) break;
      candidates_ &= ~(1u << at);
    }
    close_at_candidate(false);
  }

  __device__ __forceinline__ void close_at_candidate(bool summed) {
    const int32_t at = candidates_ != 0 ? 31 - __clz(static_cast<int>(candidates_)) : 0;
    const double prefix = __shfl_sync(kAllLanes, prefix_, at);
    close_at(at, prefix > 0.0 ? 1.0 / prefix : 0.0, summed);
  }

  // What is left of a node's row without the token that follows, where it was not drawn from a law.
  __device__ __forceinline__ double left_of_point(int32_t node) const {
    if (!dense_) {
      const double left = 1.0 - shared_.records[node].prob;
      return left > 0.0 ? left : 0.0;
    }
    const uint64_t whole = shared_.records[node].law.mass, removed = removed_mass(node);
    return removed < whole ? static_cast<double>(whole - removed) / static_cast<double>(whole) : 0.0;
  }

  // Of the token that follows a node, in the node's row. By the first warp.
  __device__ __forceinline__ uint64_t removed_mass(int32_t node) const {
    return mass_of(weight_in(shared_.records[node].law, __shfl_sync(kAllLanes, node_.of_target, node + 1)));
  }

  __device__ __forceinline__ bool passes(int32_t node, double left) const {
    const double prefix = __shfl_sync(kAllLanes, prefix_, node);
    return accepts_fraction(__shfl_sync(kAllLanes, node_.coin, node), block_fraction(prefix, prefix * left));
  }

  // The masses of the residual that was asked for are there. By the first warp.
  __device__ __forceinline__ void go_on(const uint64_t* masses) {
    const int32_t at = 31 - __clz(static_cast<int>(candidates_));
    uint64_t mass = 0;
    for (uint32_t tile = lane_id(); tile < tiles_; tile += kWarpSize) mass += masses[tile];
    mass = sum_of_masses(mass);
    if (passes(at, static_cast<double>(mass) / static_cast<double>(shared_.records[at].law.mass))) {
      return close_at_candidate(true);
    }
    candidates_ &= ~(1u << at);
    next_candidate();
  }

  __device__ __forceinline__ void then(const ChainStep& step) {
    __syncwarp();
    if (lane_id() == 0) shared_.step = step;
  }

  // `last` is the last draft that is kept.
  __device__ __forceinline__ void close_at(int32_t last, double gain, bool summed) {
    const RowLaw& law = shared_.records[last].law;
    const bool rejected = last < length_;
    ChainStep step{
        true, summed, last, status_, -1.0, -1, 0, -1, __shfl_sync(kAllLanes, node_.closing_bits, last)};
    if (!law.usable) step.status |= kLawLost;
    if (!law.usable || greedy_) {
      step.closing = law.top;
    } else if (rejected && has_residuals()) {
      step.gain = gain;
    } else if (rejected) {
      step.removed = __shfl_sync(kAllLanes, node_.token, last + 1);
      step.removed_mass = removed_mass(last);
    }
    then(step);
  }

  __device__ __forceinline__ float gain_of(const ChainStep& step) const {
    return gain_in_weights(step.gain, shared_.records[step.node].law.mass,
                           shared_.records[draft_row(step.node)].law.mass);
  }

  // The masses of the tiles of [target - gain * draft]+, to every block; without a draft's row, of the
  // target.
  __device__ __forceinline__ void sum_residual(const ChainStep& step, int turn) {
    const bool with_draft = step.gain >= 0.0;
    const uint32_t target_row = static_cast<uint32_t>(step.node),
                   other_row = with_draft ? draft_row(step.node) : target_row;
    const float gain = with_draft ? gain_of(step) : 0.0f;
    const RowLaw& target = shared_.records[target_row].law;
    const RowLaw& draft = shared_.records[other_row].law;
    const float target_max = target.max, target_scale = target.scale, target_cut = target.cut;
    const float draft_max = draft.max, draft_scale = draft.scale, draft_cut = draft.cut;
    const void* const target_data = row_data(target_row);
    const void* const draft_data = row_data(other_row);
#pragma unroll 1
    for (uint32_t index = warp_ * size_ + rank_; index < tiles_; index += size_ * kWarps) {
      RawTile<kType> target_tile, draft_tile;
      TileOfRow<kType>::load(target_tile, target_data, vocab_, index, args_.aligned);
      TileOfRow<kType>::load(draft_tile, draft_data, vocab_, index, args_.aligned);
      PinnedSum sum;
      LaneMass lane_mass;
#pragma unroll 2
      for (int quarter = 0; quarter < 4; ++quarter) {
        Eight weights = next_quarter(target_tile);
        const Eight other = next_quarter(draft_tile);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          weights.x[j] =
              residual_weight(weight_of_logit(weights.x[j], target_max, target_scale, target_cut),
                              weight_of_logit(other.x[j], draft_max, draft_scale, draft_cut), gain);
          lane_mass.add(weights.x[j]);
        }
        sum.add(quarter, weights);
      }
      const uint64_t mass = sum_of_masses(lane_mass.total());
      const uint64_t of_sum = mass_of_tile(sum.total(), 1.0f);
      if (static_cast<uint32_t>(lane_id()) < size_) {
        DrawScratch* there = of_block(&shared_.draw, static_cast<uint32_t>(lane_id()));
        there->masses[turn % 2][index] = mass;
        there->sums[turn % 2][index] = of_sum;
      }
    }
  }

  // Every block draws for itself, so that all know whether the row has to be read once more.
  __device__ __forceinline__ void close(ChainStep step, int turn) {
    int64_t token = step.closing;
    bool exact = step.gain >= 0.0;
#pragma unroll 1
    while (token < 0) {
      if (exact && !step.summed) {
        sum_residual(step, ++turn);
        cluster_sync();
        step.summed = true;
      }
      token = draw(step, turn, exact);
      if (token == kUndecided) {
        exact = true;
      } else if (token < 0) {  // both laws agree to the last bit: what is left to draw from is the target
        step.gain = -1.0;
        step.removed = -1;
        step.summed = false;
      }
    }
    if (rank_ == 0) write(step.node, token, step.status, step.node + 1);
    if (args_.stats == nullptr) cluster_sync();  // the others may still read the first block's memory
  }

  struct Running {
    uint64_t before, total;  // of the threads before this one; of all
  };

  // Behind a barrier nobody reads what this leaves in shared memory.
  __device__ __forceinline__ Running sum_up_to_thread(uint64_t mine) {
    const uint64_t up_to = sum_up_to_lane(mine);
    if (lane_id() == kWarpSize - 1) shared_.draw.warp_words[warp_] = up_to;
    __syncthreads();
    const uint32_t lane = static_cast<uint32_t>(lane_id());
    const uint64_t word = lane < kWarps ? shared_.draw.warp_words[lane] : 0;
    const uint64_t of_warps = sum_of_masses(lane < warp_ ? word : 0);
    return {of_warps + up_to - mine, sum_of_masses(word)};
  }

  // A token of the masses that sum_residual() left; where they are not `exact`, of those that follow from the
  // row's statistics, if these decide. By all threads of a block, two tiles and then two elements each; see
  // TokenDraw in cuda/draw.cuh. -1: there is no mass at all.
  __device__ __forceinline__ int64_t draw(const ChainStep& step, int turn, bool exact) {
    static_assert(2 * kThreads == kTile && 2 * kThreads >= kMaxTiles);
    const RowLaw& law = shared_.records[step.node].law;
    __syncthreads();
    if (threadIdx.x == 0) {
      shared_.tile = -1;
      shared_.drawn = kUndecided;
    }
    uint64_t mass[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t index = 2 * threadIdx.x + i;
      mass[i] = 0;
      if (index >= tiles_) continue;
      if (exact) {
        mass[i] = shared_.draw.masses[turn % 2][index];
      } else {
        const float2 found = this->read(stats(static_cast<uint32_t>(step.node)) + index);
        mass[i] = mass_of_stats({found.x, found.y}, law);
      }
      // Of an estimate a tile may have less than what is taken away.
      if (step.removed >= 0 && step.removed / kTile == index)
        mass[i] -= mass[i] < step.removed_mass ? mass[i] : step.removed_mass;
    }
    const Running of_tiles = sum_up_to_thread(mass[0] + mass[1]);
    uint64_t reach = 0;
    if (!exact) {
      reach = reach_of_estimate(law.mass, tiles_, false);
      if (of_tiles.total / 4 < reach) return kUndecided;
    }
    const uint64_t left_of_all = multiply_high(step.bits, of_tiles.total);
    uint64_t begin = of_tiles.before;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint64_t left = left_of_all - begin;
      if (left_of_all >= begin && left < mass[i]) {
        const uint32_t index = 2 * threadIdx.x + i;
        const bool near =
            !exact && ((index != 0 && left < reach) || (index != tiles_ - 1 && mass[i] - left <= reach));
        shared_.tile = near ? -1 : static_cast<int32_t>(index);
        shared_.left = left;
      }
      begin += mass[i];
    }
    __syncthreads();
    if (shared_.tile < 0) return exact ? -1 : kUndecided;
    return draw_in_tile(step, static_cast<uint32_t>(shared_.tile), shared_.left, reach);
  }

  // The element in whose interval `left` falls, counted in exact masses from the tile's first.
  __device__ __forceinline__ int64_t draw_in_tile(const ChainStep& step, uint32_t tile, uint64_t left,
                                                  uint64_t reach) {
    const RowLaw& target = shared_.records[step.node].law;
    const uint32_t first = tile * kTile + 2 * threadIdx.x;
    uint64_t mass[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mass[i] = 0;
      const uint32_t at = first + i;
      if (at >= vocab_) continue;
      float weight = weight_of_logit(element(static_cast<uint32_t>(step.node), at), target.max, target.scale,
                                     target.cut);
      if (step.gain >= 0.0) {
        const RowLaw& draft = shared_.records[draft_row(step.node)].law;
        weight = residual_weight(
            weight, weight_of_logit(element(draft_row(step.node), at), draft.max, draft.scale, draft.cut),
            gain_of(step));
      }
      if (at != step.removed) mass[i] = mass_of(weight);
    }
    const Running running = sum_up_to_thread(mass[0] + mass[1]);
    uint64_t begin = running.before;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint64_t end = begin + mass[i];
      const bool near = reach != 0 && ((begin != 0 && left - begin < reach) || end - left <= reach);
      if (begin <= left && left < end && !near) shared_.drawn = first + i;
      begin = end;
    }
    __syncthreads();
    return shared_.drawn;
  }

  // `emitted`: the drafts that are kept and the closing token; 0: nothing is. By a block, a warp for each
  // output.
  __device__ __forceinline__ void write(int32_t last, int64_t closing, int32_t status,
                                        int32_t emitted) const {
    if (args_.samples) return write_sample(closing, status);
    const int32_t i = lane_id();
    if (warp_ == 0) {
      const int32_t next = __shfl_down_sync(kAllLanes, node_.token, 1);
      if (i > args_.most_drafts) return;
      const int64_t token = emitted == 0 || i > last ? -1 : i < last ? next : closing;
      write_number(args_.tokens, token, b_, i);
      if (args_.path.data && i > 0) write_number(args_.path, emitted > 0 && i <= last ? i : -1, b_, i - 1);
    }
    if (i != 0) return;
    if (warp_ == 1) write_number(args_.num_emitted, emitted, b_);
    if (warp_ == 2) write_number(args_.num_accepted, last, b_);
    if (warp_ == 3) write_number(args_.next_token, closing, b_);
    if (warp_ == 4) write_number(args_.status, status, b_);
    if (warp_ != 5) return;
    // Unsigned, where any base of a damaged row has a result.
    const uint64_t base = static_cast<uint64_t>(read_number(args_.base, b_));
    write_number(args_.next_lengths, static_cast<int64_t>(base - 1 + static_cast<uint64_t>(emitted)), b_);
  }

  __device__ __forceinline__ void write_sample(int64_t token, int32_t status) const {
    if (lane_id() != 0) return;
    RowLaw law;
    law.usable = false;
    if ((status & kBadRow) == 0) law = shared_.records[0].law;
    if (warp_ == 0) write_number(args_.tokens, token, b_);
    if (warp_ == 1 && args_.status.data) write_number(args_.status, status, b_);
    if (warp_ == 2 && args_.records != nullptr)
      write_record(law, args_.records + b_ * args_.record_strides[0], args_.record_strides[1]);
    if (warp_ != 3 || args_.logprobs == nullptr) return;
    args_.logprobs[b_ * args_.logprob_stride] =
        law.usable ? log_probability(law, token, element(0, static_cast<uint32_t>(token))) : -infinity();
  }

  // Of this lane's node, in the first warp of a block.
  ChainNode node_{0, -1, 0, 0.0f, 0.0f};
  double target_prob_ = 0.0, draft_prob_ = 1.0, prefix_ = 1.0;
  int32_t length_ = 0, end_ = 0;  // drafts that count; where the descent ends
  unsigned candidates_ = 0;
};

}  // namespace foretoken::cuda

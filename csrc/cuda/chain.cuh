// Verification of plain chains, and sampling of plain rows: no tree, no edits of logits, laws as logits or
// none. A cluster takes a request, or several share the reading of its rows and the last of them goes on
// alone. Each row's law is made by one warp; from the laws every block decides the same for itself, so nobody
// has to be told what to do next.
//
// Most of what follows the reading is done once, by few threads, and takes as long as its instructions are
// many: hence the inlining, the work dealt out to idle warps, and no structure that would live in memory.
#pragma once

#include "cuda/chain_draw.cuh"

namespace foretoken::cuda {

template <DType kType>
class ChainVerifier : ChainDraw<kType, false> {
 public:
  __device__ __forceinline__ ChainVerifier(const ChainArgs& args, ChainShared& shared) : Base(args, shared) {}

  __device__ __forceinline__ void run() {
    const bool scouts = rank_ == 0 && warp_ == 0;
    const uint32_t clusters = static_cast<uint32_t>(args_.clusters);
    const bool given = args_.given != nullptr;
    const uint32_t of_target = static_cast<uint32_t>(args_.most_drafts) + 1, first = given ? of_target : 0;
    const bool of_drafts = args_.draft.data != nullptr && args_.draft_records == nullptr;
    const uint32_t end = of_target + (of_drafts ? static_cast<uint32_t>(args_.most_drafts) : 0);
    // The warps that look ahead come last, and have no share of a few tiles.
    const uint32_t warps = size_ * kWarps * clusters, warp = (warp_ * size_ + rank_) * clusters + part_;
    const bool all_read = (end - first) * tiles_ >= kTilesForAll * warps;
    typename Rows::RowTiles tiles(scouts ? warp + warps - clusters : warp - clusters,
                                  all_read ? warps : warps - clusters, first, first + 1, end - first, tiles_);
    RawTile<kType> raw;
    ChainNode seen{};
    if (scouts) seen = this->look_at_drafts();
    if (!scouts && !args_.prepared && tiles.any()) this->load(tiles.row(), tiles.index(), raw);
    if (args_.stats == nullptr) cluster_sync();  // nobody's memory is written before everybody runs
    if (!this->read_header()) {
      if (part_ == 0 && rank_ == 0) write(0, -1, status_, 0);
      return;
    }
    const bool filtered = !args_.prepared && this->any_filter();
    if (scouts) {
      if (part_ == 0 && lane_id() == 0 && this->may_meet()) *this->together().told() = 0;
      this->look_ahead(seen);
    }
    if (!filtered && !args_.prepared && (!scouts || all_read)) {
      if (scouts && tiles.any()) this->load(tiles.row(), tiles.index(), raw);
      this->stream(raw, tiles);
    }
    if (given && !filtered) this->take_given();  // thresholds are found in the rows
    if (filtered) this->make_own_laws();
    if (!filtered && this->may_meet() ? !this->meets() : !this->goes_on()) return;
    if (warp_ == 0) {
      node_ = *of_block(&shared_.nodes[lane_id()], 0);
      if (dense_ && args_.draft_records != nullptr) take_records();
    }
    if (args_.prepared || (filtered && args_.clusters > 1)) {
      this->take_laws();
    } else if (!filtered) {
      this->make_laws();
    }
    if (this->tells_laws() || filtered) {
      cluster_sync();
    } else {
      __syncthreads();
    }
    if (warp_ == 0) begin();
    __syncthreads();
    go_to_end();
  }

 private:
  using Base = ChainDraw<kType, false>;
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
  // Of a block: pairs of tiles that take as long as a turn takes besides, 1.6 us.
  static constexpr uint32_t kTilesBeside = 8;
  static constexpr uint32_t kTilesForAll = 8;  // a warp: far more than one that looks ahead is late

  __device__ __forceinline__ bool walks_up() const {
    return !greedy_ && drafts_ > 0 &&
           (args_.rule == Rule::traversal || (args_.rule == Rule::automatic && dense_));
  }

  // From step to step. In one place residuals are added up, for whoever wants it: it is a lot of code.
  __device__ __forceinline__ void go_to_end() {
    const Part part = shared_.part;
    bool together = part == Part::leads || part == Part::helps;
    ChainStep step = shared_.step;
    OneRemoved removed{step.removed, step.removed_mass};
    int64_t token;
    int turn = 0;
#pragma unroll 1
    while (true) {
      if (this->wants_masses(step)) {
        step.together = together;
        ++turn;
        if (!together) {
          this->sum_residual(step, turn);
          cluster_sync();
        } else {
          this->template sum_residual<true>(step, turn);
          // For the draw that ends it nobody but the one who writes has to wait.
          meet_again(this->together().told(), static_cast<uint32_t>(turn * args_.clusters),
                     !step.close || part == Part::leads);
          if (step.close && part == Part::helps) return;
          together = !step.close;
        }
        step.summed = true;
      }
      if (!step.close) {
        if (warp_ == 0) go_on(turn, step.together);
        __syncthreads();
        step = shared_.step;
        step.together = together;
        removed = {step.removed, step.removed_mass};
      } else if (this->closes(step, turn, removed, token)) {
        break;
      }
    }
    if (part == Part::helps) return;
    cluster_show_up();
    if (rank_ == 0) write(step.node, token, step.status, step.node + 1);
    cluster_wait();  // others may still read this block's memory
  }

  // The laws that drafts were drawn from, from whoever drew. By the first warp of each block.
  __device__ __forceinline__ void take_records() {
    const int32_t node = lane_id();
    if (node < 1 || node > drafts_) return;
    const int64_t* const strides = args_.draft_record_strides;
    const RowLaw law =
        read_record(args_.draft_records + b_ * strides[0] + (node - 1) * strides[1], strides[2], vocab_);
    const double prob = law.kind == LawKind::point ? (node_.token == law.top ? 1.0 : 0.0)
                                                   : probability_in(law, node_.of_draft);
    shared_.records[draft_row(node - 1)] = {law, prob};
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

  // Whether what a rejected draft leaves of a node's row takes two rows to tell.
  __device__ __forceinline__ bool has_residual(int32_t node) const {
    return dense_ && shared_.records[draft_row(node)].law.kind == LawKind::logits;
  }

  __device__ __forceinline__ void next_candidate() {
#pragma unroll 1
    while (candidates_ != 0) {
      const int32_t at = last_candidate(candidates_);
      const double prefix = __shfl_sync(kAllLanes, prefix_, at);
      if (at == end_ || prefix == 1.0) break;
      if (has_residual(at)) {
        ChainStep step{false, false, at, status_, 1.0 / prefix, -1, 0, -1, 0};
        const unsigned others = candidates_ & ~(1u << at);
        const int32_t other = last_candidate(others);
        const double of_other = __shfl_sync(kAllLanes, prefix_, others != 0 ? other : 0);
        // Where adding up another residual takes no longer than coming back for it, which one in two does.
        const uint32_t blocks = shared_.part == Part::alone ? size_ : static_cast<uint32_t>(args_.clusters);
        if (others != 0 && of_other != 1.0 && tiles_ <= kTilesBeside * blocks && has_residual(other)) {
          step.other = other;
          step.other_gain = 1.0 / of_other;
        }
        return then(step);
      }
      if (passes(at, left_of_point(at))) break;
      candidates_ &= ~(1u << at);
    }
    close_at_candidate(false);
  }

  __device__ static __forceinline__ int32_t last_candidate(unsigned candidates) {
    return 31 - __clz(static_cast<int>(candidates));
  }

  __device__ __forceinline__ void close_at_candidate(bool summed, int32_t which = 0) {
    const int32_t at = candidates_ != 0 ? last_candidate(candidates_) : 0;
    const double prefix = __shfl_sync(kAllLanes, prefix_, at);
    close_at(at, prefix > 0.0 ? 1.0 / prefix : 0.0, summed, which);
  }

  // What is left of a node's row without the token that follows, which was chosen.
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

  __device__ __forceinline__ uint64_t mass_of_residual(int turn, int32_t which, bool together) const {
    if (!together) return mass_of_turn(shared_.draw, turn, which);
    uint64_t mass = 0;
    for (uint32_t index = static_cast<uint32_t>(lane_id()); index < tiles_; index += kWarpSize)
      mass += __ldcg(this->together().sum(turn, which, index));
    return sum_of_masses(mass);
  }

  // The masses of the residuals that were asked for are there. By the first warp.
  __device__ __forceinline__ void go_on(int turn, bool together) {
    const int32_t count = shared_.step.other >= 0 ? 2 : 1;
#pragma unroll 1
    for (int32_t which = 0; which < count; ++which) {
      const int32_t at = last_candidate(candidates_);
      const uint64_t mass = mass_of_residual(turn, which, together);
      if (passes(at, static_cast<double>(mass) / static_cast<double>(shared_.records[at].law.mass))) {
        return close_at_candidate(true, which);
      }
      candidates_ &= ~(1u << at);
    }
    next_candidate();
  }

  __device__ __forceinline__ void then(const ChainStep& step) {
    __syncwarp();
    if (lane_id() == 0) shared_.step = step;
  }

  // `last` is the last draft that is kept.
  __device__ __forceinline__ void close_at(int32_t last, double gain, bool summed, int32_t which = 0) {
    const RowLaw& law = shared_.records[last].law;
    const bool rejected = last < length_;
    ChainStep step{
        true, summed, last, status_, -1.0, -1, 0, -1, __shfl_sync(kAllLanes, node_.closing_bits, last)};
    step.which = which;
    if (!law.usable) step.status |= kLawLost;
    if (!law.usable || greedy_) {
      step.closing = law.top;
    } else if (rejected && has_residual(last)) {
      step.gain = gain;
    } else if (rejected) {
      step.removed = __shfl_sync(kAllLanes, node_.token, last + 1);
      step.removed_mass = removed_mass(last);
    }
    then(step);
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

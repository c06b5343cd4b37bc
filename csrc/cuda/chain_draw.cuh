// Closing tokens: drawn from what rejected drafts leave of a row, by all threads of every block.
#pragma once

#include "cuda/chain_residual.cuh"

namespace foretoken::cuda {

// What is taken away from a row before a token is drawn: one token, or several distinct ones. Of an estimate
// a tile may have less than that.
struct OneRemoved {
  int64_t token;  // -1: none
  uint64_t of_token;

  __device__ __forceinline__ uint64_t left_of_tile(uint32_t index, uint64_t mass) const {
    if (token < 0 || token / kTile != index) return mass;
    return mass - (mass < of_token ? mass : of_token);
  }
  __device__ __forceinline__ bool holds(uint32_t at) const { return at == token; }
  __device__ __forceinline__ void clear() { token = -1; }
};

struct SeveralRemoved {
  const RemovedToken* tokens;
  int32_t count;

  __device__ __forceinline__ uint64_t left_of_tile(uint32_t index, uint64_t mass) const {
#pragma unroll 1
    for (int32_t i = 0; i < count; ++i) {
      if (static_cast<uint32_t>(tokens[i].token) / kTile == index)
        mass -= mass < tokens[i].mass ? mass : tokens[i].mass;
    }
    return mass;
  }
  __device__ __forceinline__ bool holds(uint32_t at) const {
#pragma unroll 1
    for (int32_t i = 0; i < count; ++i) {
      if (static_cast<uint32_t>(tokens[i].token) == at) return true;
    }
    return false;
  }
  __device__ __forceinline__ void clear() { count = 0; }
};

template <DType kType, bool kTree, bool kDrawn = false>
class ChainDraw : protected ChainResidual<kType, kTree, kDrawn> {
 protected:
  using Residual = ChainResidual<kType, kTree, kDrawn>;
  using Rows = ChainRows<kType, kTree, kDrawn>;
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

  __device__ __forceinline__ ChainDraw(const ChainArgs& args, ChainShared& shared) : Residual(args, shared) {}

  // The token of a step that closes. Every block draws for itself, so that all know whether the row has to be
  // read once more. The caller waits for the cluster before it leaves: others may still read its memory.
  template <class Removed>
  __device__ __forceinline__ int64_t closing_token(ChainStep step, int turn, Removed removed) {
    int64_t token;
    do {
      if (wants_masses(step)) {
        this->sum_residual(step, ++turn);
        cluster_sync();
        step.summed = true;
      }
    } while (!closes(step, turn, removed, token));
    cluster_show_up();
    return token;
  }

  static __device__ __forceinline__ bool wants_masses(const ChainStep& step) {
    return !step.summed && (!step.close || (step.closing < 0 && (step.exact || step.gain >= 0.0)));
  }

  // Whether a step that closes has its token; else the masses are wanted of what is in the step now.
  template <class Removed>
  __device__ __forceinline__ bool closes(ChainStep& step, int turn, Removed& removed, int64_t& token) {
    token = step.closing;
    if (token >= 0) return true;
    step.exact = step.exact || step.gain >= 0.0;
    token = draw(step, turn, step.exact, removed);
    if (token >= 0) return true;
    if (!step.exact) {
      step.exact = true;
    } else if (step.whole) {  // statistics of another row were given: any token will do
      token = 0;
      return true;
    } else {  // both laws agree to the last bit: what is left to draw from is the target
      step.gain = -1.0;
      step.whole = true;
      removed.clear();
    }
    step.summed = false;
    step.other = -1;
    step.which = 0;
    return false;
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
  // row's statistics, if these decide. By all threads of a block, a tile each, of long rows two, and then two
  // elements; see TokenDraw in cuda/draw.cuh. -1: there is no mass at all.
  template <class Removed>
  __device__ __forceinline__ int64_t draw(const ChainStep& step, int turn, bool exact,
                                          const Removed& removed) {
    static_assert(2 * kThreads == kTile && 2 * kThreads >= kMaxTiles);
    const RowLaw& law = shared_.records[step.node].law;
    __syncthreads();
    if (threadIdx.x == 0) {
      shared_.tile = -1;
      shared_.drawn = kUndecided;
    }
    const auto mass_of_one = [&](uint32_t index) -> uint64_t {
      if (index >= tiles_) return 0;
      if (exact) return removed.left_of_tile(index, this->mass_at(step, turn, index));
      const float2 found = this->read(stats(static_cast<uint32_t>(step.node)) + index);
      return removed.left_of_tile(index, mass_of_stats({found.x, found.y}, law));
    };
    const bool two = tiles_ > kThreads;
    const uint32_t first = two ? 2 * threadIdx.x : threadIdx.x;
    const uint64_t mass[2] = {mass_of_one(first), two ? mass_of_one(first + 1) : 0};
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
      if (i == 1 && !two) break;
      const uint64_t left = left_of_all - begin;
      if (left_of_all >= begin && left < mass[i]) {
        const uint32_t index = first + i;
        const bool near =
            !exact && ((index != 0 && left < reach) || (index != tiles_ - 1 && mass[i] - left <= reach));
        shared_.tile = near ? -1 : static_cast<int32_t>(index);
        shared_.left = left;
      }
      begin += mass[i];
    }
    __syncthreads();
    if (shared_.tile < 0) return exact ? -1 : kUndecided;
    return draw_in_tile(step, static_cast<uint32_t>(shared_.tile), shared_.left, reach, removed);
  }

  // The element in whose interval `left` falls, counted in exact masses from the tile's first.
  template <class Removed>
  __device__ __forceinline__ int64_t draw_in_tile(const ChainStep& step, uint32_t tile, uint64_t left,
                                                  uint64_t reach, const Removed& removed) {
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
      if (!kTree && step.gain >= 0.0) {
        const RowLaw& draft = shared_.records[this->law_row(step.node)].law;
        const float logit = fminf(element(this->law_row(step.node), at), draft.max);
        weight = residual_weight(weight, weight_of_logit(logit, draft.max, draft.scale, draft.cut),
                                 this->gain_of(step.gain, step.node));
      }
      if (!removed.holds(at)) mass[i] = mass_of(weight);
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
};

}  // namespace foretoken::cuda

// Closing tokens: drawn from what rejected drafts leave of a row, by all threads of every block.
#pragma once

#include "cuda/chain_laws.cuh"
#include "cuda/copy_ahead.cuh"

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
class ChainDraw : protected ChainLaws<kType, kTree, kDrawn> {
 protected:
  using Laws = ChainLaws<kType, kTree, kDrawn>;
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

  static constexpr bool kMayMeet = !kTree && !kDrawn;

  __device__ __forceinline__ ChainDraw(const ChainArgs& args, ChainShared& shared) : Laws(args, shared) {}

  // The token of a step that closes. Every block draws for itself, so that all know whether the row has to be
  // read once more. The caller waits for the cluster before it leaves: others may still read its memory.
  template <class Removed>
  __device__ __forceinline__ int64_t closing_token(ChainStep step, int turn, Removed removed) {
    int64_t token;
    do {
      if (wants_masses(step)) {
        sum_residual(step, ++turn);
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

  __device__ __forceinline__ float gain_of(double gain, int32_t node) const {
    return gain_in_weights(gain, shared_.records[node].law.mass,
                           shared_.records[this->law_row(node)].law.mass);
  }

  // Of one residual, or of two that are added up together.
  struct Sides {
    const void *target, *draft;
    float gain, target_max, target_scale, target_cut, draft_max, draft_scale, draft_cut;
  };
  __device__ __forceinline__ Sides sides_of(const ChainStep& step, bool second) const {
    const int32_t node = second ? step.other : step.node;
    const double gain = second ? step.other_gain : step.gain;
    const bool with_draft = !kTree && gain >= 0.0;
    const uint32_t row = static_cast<uint32_t>(node), other = with_draft ? this->law_row(node) : row;
    const RowLaw &target = shared_.records[row].law, &draft = shared_.records[other].law;
    return {row_data(row), row_data(other), with_draft ? gain_of(gain, node) : 0.0f,
            target.max,    target.scale,    target.cut,
            draft.max,     draft.scale,     draft.cut};
  }

  // What is left of a quarter, in place.
  template <bool kOfTarget>
  __device__ __forceinline__ void take_away(Eight& weights, Eight& other, const Sides& sides) const {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      weights.x[j] = weight_of_logit(weights.x[j], sides.target_max, sides.target_scale, sides.target_cut);
    if constexpr (!kOfTarget) {
      if (args_.draft_records != nullptr) {  // of a law that is not this row's: see cpu/row_kernels.inl
#pragma unroll
        for (int j = 0; j < 8; ++j) other.x[j] = fminf(other.x[j], sides.draft_max);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        weights.x[j] = residual_weight(
            weights.x[j], weight_of_logit(other.x[j], sides.draft_max, sides.draft_scale, sides.draft_cut),
            sides.gain);
      }
    }
  }

  // Where the mass of a tile is, and that of the same tile of the other residual: tiles that can be read 16
  // bytes at a time are dealt out to all warps of the cluster, and then the others, the last warp first.
  __device__ __forceinline__ uint32_t whole_tiles() const { return args_.aligned ? vocab_ / kTile : 0; }
  __device__ __forceinline__ uint32_t owner_of(uint32_t index, bool second) const {
    const uint32_t whole = whole_tiles();
    if (index < whole) return (index + (second ? whole : 0)) % size_;
    return size_ - 1 - (index - whole + (second ? tiles_ - whole : 0)) % size_;
  }
  __device__ __forceinline__ uint64_t mass_at(const ChainStep& step, int turn, uint32_t index) const {
    const int32_t which = step.which;
    if (kMayMeet && step.together) return this->together().mass_at(turn, which, index);
    return of_block(&shared_.draw, owner_of(index, which != 0))->masses[turn % 2][which][index];
  }

  // The masses of the tiles of [target - gain * draft]+; without a draft's row, of the target. Of one node,
  // or of two. They stay with the block that added them up: to tell them to all takes longer than all take to
  // look. kTogether: all blocks that have met add up, and tell each other.
  template <bool kTogether = false>
  __device__ __forceinline__ void sum_residual(const ChainStep& step, int turn) {
    if constexpr (kTree) {
      sum_tiles<kTogether, true>(step, turn, 1);
    } else if (step.gain < 0.0) {
      sum_tiles<kTogether, true>(step, turn, 1);
    } else {
      sum_tiles<kTogether, false>(step, turn, step.other >= 0 ? 2 : 1);
    }
  }

  template <bool kTogether, bool kOfTarget>
  __device__ __forceinline__ void sum_tiles(const ChainStep& step, int turn, uint32_t count) {
    uint64_t sums[2] = {0, 0};
    sum_whole_tiles<kTogether, kOfTarget>(step, turn, count, sums);
    sum_other_tiles<kTogether, kOfTarget>(step, turn, count, sums);
    if (kTogether) return;
    if (lane_id() < 2) shared_.draw.sums[turn % 2][lane_id()][warp_] = lane_id() == 0 ? sums[0] : sums[1];
  }

  // Who adds up a residual's tiles: the warps of this cluster, or of all blocks that have met.
  struct Crew {
    uint32_t worker, workers;
  };
  template <bool kTogether>
  __device__ __forceinline__ Crew crew() const {
    if (!kTogether) return {warp_ * size_ + rank_, size_ * kWarps};
    const uint32_t blocks = static_cast<uint32_t>(args_.clusters);
    return {warp_ * blocks + part_, blocks * kWarps};
  }

  // `first`, `quarters`: what was summed of the tile.
  template <bool kTogether>
  __device__ __forceinline__ void keep(const ChainStep& step, int turn, bool second, uint32_t index,
                                       int first, int quarters, const LaneMass& lane_mass,
                                       const PinnedSum& sum, uint64_t (&sums)[2]) {
    const int32_t which = second ? 1 : 0;
    const uint64_t mass = sum_of_masses(lane_mass.total());
    if constexpr (!kTogether) {
      if (lane_id() == 0) shared_.draw.masses[turn % 2][which][index] = mass;
    } else if (lane_id() < quarters) {
      __stcg(this->together().masses(turn, which, index) + first + lane_id(), lane_id() == 0 ? mass : 0);
    }
    if (step.close) return;  // a token is drawn from the masses alone
    const uint64_t of_sum = mass_of_tile(sum.total(), 1.0f);
    if constexpr (!kTogether) {
      (second ? sums[1] : sums[0]) += of_sum;
    } else if (lane_id() == 0) {
      __stcg(this->together().sum(turn, which, index), of_sum);
    }
  }

  // A quarter is on its way while the one before is summed. No more of the loops is unrolled: where a warp
  // has a tile or two, it waits for instructions that come for the first time.
  template <bool kTogether, bool kOfTarget>
  __device__ __forceinline__ void sum_whole_tiles(const ChainStep& step, int turn, uint32_t count,
                                                  uint64_t (&sums)[2]) {
    constexpr int kLoads = RawTile<kType>::kLoads, kBytes = RawTile<kType>::kBytes;
    const auto [worker, workers] = crew<kTogether>();
    const uint32_t whole = whole_tiles();
    // Nothing but masses is wanted for a draw: then a tile is shared where there are more warps than tiles.
    uint32_t shift = 0;
    if (kTogether && step.close) shift = workers >= 4 * whole ? 2 : workers >= 2 * whole ? 1 : 0;
    const uint32_t of_row = whole << shift, items = count * of_row;
    const int quarters = kTogether ? 4 >> shift : 4;
    uint32_t item = worker;
    if (item >= items) return;
    struct Place {
      uint32_t index;
      int first;  // quarter
    };
    const auto place_of = [&](uint32_t number, bool second) -> Place {
      const uint32_t rest = second ? number - of_row : number;
      return {rest >> shift, static_cast<int>(rest - (rest >> shift << shift)) * quarters};
    };
    uint4 of_target[kLoads], of_draft[kLoads];
    const auto load = [&](const Sides& sides, uint32_t index, int quarter) {
      const uint64_t at =
          (static_cast<uint64_t>(index) * kTile + static_cast<uint32_t>(quarter * 256 + lane_id() * 8)) *
          kBytes;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        of_target[i] =
            __ldcs(reinterpret_cast<const uint4*>(static_cast<const char*>(sides.target) + at) + i);
        if constexpr (!kOfTarget)
          of_draft[i] =
              __ldcs(reinterpret_cast<const uint4*>(static_cast<const char*>(sides.draft) + at) + i);
      }
    };
    // Rows may have left the second-level cache since they were read.
    const auto send_for = [&](const Sides& sides, uint32_t index) {
      const uint64_t at = static_cast<uint64_t>(index) * kTile * kBytes;
      if (lane_id() == 0) bring_closer(static_cast<const char*>(sides.target) + at, kTile * kBytes);
      if (!kOfTarget && lane_id() == 1)
        bring_closer(static_cast<const char*>(sides.draft) + at, kTile * kBytes);
    };
    bool second = item >= of_row;
    Sides sides = sides_of(step, second);
    Place place = place_of(item, second);
    if (shift == 0) send_for(sides, place.index);
    load(sides, place.index, place.first);
#pragma unroll 1
    while (true) {
      const auto [index, first] = place;
      const int end = first + quarters;
      if (shift == 0 && index + workers < whole) send_for(sides, index + workers);
      PinnedSum sum;
      LaneMass lane_mass;
#pragma unroll 1
      for (int q = first; q < end; ++q) {
        Eight weights, other{};
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          unpack_words<kType>(of_target[i], weights.x + i * (8 / kLoads));
          if constexpr (!kOfTarget) unpack_words<kType>(of_draft[i], other.x + i * (8 / kLoads));
        }
        if (q + 1 < end) load(sides, index, q + 1);
        take_away<kOfTarget>(weights, other, sides);
#pragma unroll
        for (int j = 0; j < 8; ++j) lane_mass.add(weights.x[j]);
        sum.add(q, weights);
      }
      const bool of_second = second;
      item += workers;
      if (item < items) {
        if (!second && item >= of_row) sides = sides_of(step, true);
        second = item >= of_row;
        place = place_of(item, second);
        load(sides, place.index, place.first);
      }
      keep<kTogether>(step, turn, of_second, index, first, quarters, lane_mass, sum, sums);
      if (item >= items) return;
    }
  }

  // Tiles that are cut by the end of a row, or lie across 16 bytes.
  template <bool kTogether, bool kOfTarget>
  __device__ __forceinline__ void sum_other_tiles(const ChainStep& step, int turn, uint32_t count,
                                                  uint64_t (&sums)[2]) {
    const uint32_t whole = whole_tiles(), of_row = tiles_ - whole;
    const auto [worker, workers] = crew<kTogether>();
#pragma unroll 1
    for (uint32_t item = workers - 1 - worker; item < count * of_row; item += workers) {
      const bool second = item >= of_row;
      const uint32_t index = whole + (second ? item - of_row : item);
      const Sides sides = sides_of(step, second);
      TileReader<false> target({sides.target, kType, vocab_}, index, false);
      TileReader<false> draft({sides.draft, kType, vocab_}, index, false);
      PinnedSum sum;
      LaneMass lane_mass;
#pragma unroll 1
      for (int q = 0; q < 4; ++q) {
        Eight weights = target.next(), other{};
        if constexpr (!kOfTarget) other = draft.next();
        take_away<kOfTarget>(weights, other, sides);
#pragma unroll
        for (int j = 0; j < 8; ++j) lane_mass.add(weights.x[j]);
        sum.add(q, weights);
      }
      keep<kTogether>(step, turn, second, index, 0, 4, lane_mass, sum, sums);
    }
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
      if (exact) return removed.left_of_tile(index, mass_at(step, turn, index));
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
                                 gain_of(step.gain, step.node));
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

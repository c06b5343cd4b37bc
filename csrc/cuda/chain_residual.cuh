// What a rejected draft leaves of a row: the masses of the tiles of [target - gain * draft]+, to the last
// unit, added up by all warps of a cluster, or of all blocks that have met.
#pragma once

#include "cuda/chain_laws.cuh"
#include "cuda/copy_ahead.cuh"

namespace foretoken::cuda {

template <DType kType, bool kTree, bool kDrawn = false>
class ChainResidual : protected ChainLaws<kType, kTree, kDrawn> {
 protected:
  using Rows = ChainRows<kType, kTree, kDrawn>;
  using Rows::args_;
  using Rows::part_;
  using Rows::rank_;
  using Rows::row_data;
  using Rows::shared_;
  using Rows::size_;
  using Rows::tiles_;
  using Rows::vocab_;
  using Rows::warp_;

  static constexpr bool kMayMeet = !kTree && !kDrawn;

  __device__ __forceinline__ ChainResidual(const ChainArgs& args, ChainShared& shared)
      : ChainLaws<kType, kTree, kDrawn>(args, shared) {}

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
};

}  // namespace foretoken::cuda

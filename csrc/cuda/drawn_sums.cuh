// Residuals of the rows of a tree of drawn drafts. A node that loses one child after the other is asked about
// again and again, each time with another gain: most of the work, the weights of its two rows, is the same.
#pragma once

#include <type_traits>

#include "cuda/chain_draw.cuh"

namespace foretoken::cuda {

// The weights of a tile in the target's row and in the law's, of a warp; each lane reads what it wrote.
struct KeptTile {
  float4 target[8][kWarpSize], draft[8][kWarpSize];
};

template <DType kType>
class DrawnSums : protected ChainDraw<kType, false, true> {
 protected:
  using Base = ChainDraw<kType, false, true>;
  using Base::args_;
  using Base::rank_;
  using Base::row_data;
  using Base::shared_;
  using Base::size_;
  using Base::tiles_;
  using Base::vocab_;
  using Base::warp_;

  __device__ __forceinline__ DrawnSums(const ChainArgs& args, ChainShared& shared) : Base(args, shared) {}

  // What sum_residual() of chains leaves, of one node or of two. `keeps_other`: where there is room for one
  // of them, the second is more likely to be asked about again.
  __device__ __forceinline__ void sum_residuals(const ChainStep& step, int turn, bool keeps_other) {
    const bool two = step.other >= 0;
    const uint32_t worker = warp_ * size_ + rank_, workers = size_ * kWarps;
    const bool apart = workers >= 2 * tiles_;  // each node has warps of its own
    // What is kept is used before it makes room.
    const bool other_last = held_ == step.node || (two && held_ != step.other && keeps_other);
    if (apart) {
      const bool in_place = held_ == step.node || (two && behind_ == step.other);
      const bool crosswise = behind_ == step.node || (two && held_ == step.other);
      behind_first_ = crosswise && held_ != step.node ? true : in_place ? false : !behind_first_;
      if (!behind_first_ || two) held_ = behind_first_ ? step.other : step.node;
      if (behind_first_ || two) behind_ = behind_first_ ? step.node : step.other;
    }
    uint64_t of_first = 0, of_other = 0;
#pragma unroll 1
    for (int32_t k = two ? 0 : 1; k < 2; ++k) {
      const bool second = two && (k == 1) == other_last;
      const int32_t node = second ? step.other : step.node;
      const uint32_t before = apart && second != behind_first_ ? tiles_ : 0;
      const float gain = this->gain_of(second ? step.other_gain : step.gain, node);
#pragma unroll 1
      for (uint32_t index = worker - before; index < tiles_; index += workers) {
        const uint32_t name = static_cast<uint32_t>(node) * kMaxTiles + index;
        if (name != kept_) weigh(node, index);
        kept_ = name;
        const uint64_t sum = add_up(index, gain, turn, second ? 1 : 0);
        (second ? of_other : of_first) += sum;
      }
      if (!apart) held_ = node;
    }
    if (static_cast<uint32_t>(lane_id()) >= size_) return;
    DrawScratch* there = of_block(&shared_.draw, static_cast<uint32_t>(lane_id()));
    there->sums[turn % 2][0][worker] = of_first;
    there->sums[turn % 2][1][worker] = of_other;
  }

 private:
  __device__ __forceinline__ KeptTile& kept_tile() const {
    return reinterpret_cast<KeptTile*>(&this->drawn_tree() + 1)[warp_];
  }

  __device__ __forceinline__ void weigh(int32_t node, uint32_t index) {
    const uint32_t target_row = static_cast<uint32_t>(node), draft_row = this->law_row(node);
    RawTile<kType> target_tile, draft_tile;
    TileOfRow<kType>::load(target_tile, row_data(target_row), vocab_, index, args_.aligned);
    TileOfRow<kType>::load(draft_tile, row_data(draft_row), vocab_, index, args_.aligned);
    KeptTile& kept = kept_tile();
    const auto keep = [&](RawTile<kType>& raw, uint32_t row, float4(&to)[8][kWarpSize], auto of_draft) {
      const RowLaw& law = shared_.records[row].law;
      const float max = law.max, scale = law.scale, cut = law.cut;
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        Eight x = next_quarter(raw);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (of_draft.value) x.x[j] = fminf(x.x[j], max);  // a law that was handed over may be another row's
          x.x[j] = weight_of_logit(x.x[j], max, scale, cut);
        }
        to[2 * quarter][lane_id()] = make_float4(x.x[0], x.x[1], x.x[2], x.x[3]);
        to[2 * quarter + 1][lane_id()] = make_float4(x.x[4], x.x[5], x.x[6], x.x[7]);
      }
    };
    keep(target_tile, target_row, kept.target, std::false_type{});
    keep(draft_tile, draft_row, kept.draft, std::true_type{});
  }

  // The mass of a tile, to every block; returns what its sum in float32 says.
  __device__ __forceinline__ uint64_t add_up(uint32_t index, float gain, int turn, int which) {
    const KeptTile& kept = kept_tile();
    PinnedSum sum;
    LaneMass lane_mass;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      Eight weights;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 target = kept.target[2 * quarter + i][lane_id()];
        const float4 draft = kept.draft[2 * quarter + i][lane_id()];
        weights.x[4 * i] = residual_weight(target.x, draft.x, gain);
        weights.x[4 * i + 1] = residual_weight(target.y, draft.y, gain);
        weights.x[4 * i + 2] = residual_weight(target.z, draft.z, gain);
        weights.x[4 * i + 3] = residual_weight(target.w, draft.w, gain);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) lane_mass.add(weights.x[j]);
      sum.add(quarter, weights);
    }
    const uint64_t mass = sum_of_masses(lane_mass.total());
    const uint64_t of_sum = mass_of_tile(sum.total(), 1.0f);
    if (static_cast<uint32_t>(lane_id()) < size_) {
      DrawScratch* there = of_block(&shared_.draw, static_cast<uint32_t>(lane_id()));
      there->masses[turn % 2][which][index] = mass;
    }
    return of_sum;
  }

  int32_t held_ = kNoNode, behind_ = kNoNode;  // nodes whose tiles are kept: by the first warps, by the next
  bool behind_first_ = true;                   // these had the first of the last nodes
  uint32_t kept_ = ~0u;                        // by this warp
};

}  // namespace foretoken::cuda

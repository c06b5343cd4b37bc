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

  // A node whose residual is likely to be wanted next. By all warps; those that have nothing else to do then
  // find its weights.
  __device__ __forceinline__ void expect(int32_t node) { held_ = node; }
  __device__ __forceinline__ void weigh_ahead(int32_t node) {
    const uint32_t index = warp_ * size_ + rank_, name = static_cast<uint32_t>(node) * kMaxTiles + index;
    if (index >= tiles_ || name == kept_) return;
    weigh(node, true, index);
    kept_ = name;
  }

  // What sum_residual() of chains leaves, but for where: masses of tiles are dealt out to the blocks in turn.
  // Of two nodes only where each has warps of its own.
  __device__ __forceinline__ void sum_residuals(const ChainStep& step, int turn) {
    const bool two = step.other >= 0;
    const int32_t first_pair = pair_of(step.node, step.gain), other_pair = two ? step.other : kNoNode;
    const uint32_t worker = warp_ * size_ + rank_, workers = size_ * kWarps, behind = behind_tiles(tiles_);
    const bool apart = behind + tiles_ <= workers;
    if (apart) {
      const bool in_place = held_ == first_pair || (two && behind_ == other_pair);
      const bool crosswise = behind_ == first_pair || (two && held_ == other_pair);
      behind_first_ = crosswise && held_ != first_pair ? true : in_place ? false : !behind_first_;
      if (!behind_first_ || two) held_ = behind_first_ ? other_pair : first_pair;
      if (behind_first_ || two) behind_ = behind_first_ ? first_pair : other_pair;
    }
    uint64_t of_first = 0, of_other = 0;
#pragma unroll 1
    for (int32_t k = two ? 0 : 1; k < 2; ++k) {
      const bool second = k == 0;
      const int32_t pair = second ? other_pair : first_pair, node = pair % kMostTreeNodes;
      const bool with_draft = pair < kMostTreeNodes;
      const float gain = with_draft ? this->gain_of(second ? step.other_gain : step.gain, node) : 0.0f;
      const uint32_t before = apart && second != behind_first_ ? behind : 0;
#pragma unroll 1
      for (uint32_t index = worker - before; index < tiles_; index += workers) {
        const uint32_t name = static_cast<uint32_t>(pair) * kMaxTiles + index;
        if (name != kept_) weigh(node, with_draft, index);
        kept_ = name;
        (second ? of_other : of_first) += add_up(index, gain, turn, second ? 1 : 0);
      }
    }
    if (lane_id() < 2) shared_.draw.sums[turn % 2][lane_id()][warp_] = lane_id() == 0 ? of_first : of_other;
  }

 private:
  // A node with its law, or without.
  __device__ __forceinline__ static int32_t pair_of(int32_t node, double gain) {
    return gain >= 0.0 ? node : node + kMostTreeNodes;
  }

  __device__ __forceinline__ KeptTile& kept_tile() const {
    return reinterpret_cast<KeptTile*>(&this->drawn_tree() + 1)[warp_];
  }

  __device__ __forceinline__ void weigh(int32_t node, bool with_draft, uint32_t index) {
    const uint32_t target_row = static_cast<uint32_t>(node);
    const uint32_t draft_row = with_draft ? this->law_row(node) : target_row;
    RawTile<kType> target_tile, draft_tile;
    TileOfRow<kType>::load(target_tile, row_data(target_row), vocab_, index, args_.aligned);
    TileOfRow<kType>::load(draft_tile, row_data(draft_row), vocab_, index, args_.aligned);
    KeptTile& kept = kept_tile();
    const auto keep = [&](RawTile<kType>& raw, uint32_t row, float4(&to)[8][kWarpSize], auto of_draft) {
      const RowLaw& law = shared_.records[row].law;
      const float max = law.max, scale = law.scale, cut = law.cut;
      // A law that was handed over may be another row's: see cpu/row_kernels.inl.
      const float limit = args_.draft_records != nullptr ? max : infinity();
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        Eight x = next_quarter(raw);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (of_draft.value) x.x[j] = fminf(x.x[j], limit);
          x.x[j] = weight_of_logit(x.x[j], max, scale, cut);
        }
        to[2 * quarter][lane_id()] = make_float4(x.x[0], x.x[1], x.x[2], x.x[3]);
        to[2 * quarter + 1][lane_id()] = make_float4(x.x[4], x.x[5], x.x[6], x.x[7]);
      }
    };
    keep(target_tile, target_row, kept.target, std::false_type{});
    keep(draft_tile, draft_row, kept.draft, std::true_type{});
  }

  // Keeps the mass of a tile, and returns what its sum in float32 says.
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
    if (lane_id() == 0) shared_.draw.masses[turn % 2][which][index] = mass;
    return mass_of_tile(sum.total(), 1.0f);
  }

  // Pairs whose tiles are kept by the first warps, and by the next; these had the first of the last two.
  int32_t held_ = kNoNode, behind_ = kNoNode;
  bool behind_first_ = true;
  uint32_t kept_ = ~0u;  // by this warp
};

}  // namespace foretoken::cuda

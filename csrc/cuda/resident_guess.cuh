// About where a threshold is, from what the first block of a cluster holds of the row: every so-manyth tile
// of it. What that suggests is checked in whole numbers, so it decides how long a search takes, never how it
// ends.
#pragma once

#include "cuda/resident_search.cuh"

namespace foretoken::cuda {

template <DType kType>
class ResidentGuess : protected ResidentSearch<kType> {
 protected:
  using Search = ResidentSearch<kType>;
  using Search::element_of_lane;
  using Search::for_own;
  using Search::lane_highs_;
  using Search::rank_;
  using Search::shared_;
  using Search::size_;
  using Search::stats_;
  using Search::tiles_;
  using Search::vocab_;
  using Search::warp_;
  using typename Search::Window;

  __device__ __forceinline__ ResidentGuess(const ChainArgs& args, unsigned char* memory)
      : Search(args, memory) {}

  // Elements worth a list; nothing is known if it is empty. `need`: so many elements, or so much mass of
  // `law.mass`.
  __device__ __forceinline__ Window guess(const RowLaw& law, bool in_number, uint64_t need) {
    const float nothing = infinity();
    if (tiles_ <= kFewTiles && tiles_ <= 2 * size_) {
      return {in_number ? -3.4028235e38f : law.cut, nothing};
    }
    if (rank_ == 0) {
      this->clear_bins();
      if (threadIdx.x == 0) {
        shared_.window[0] = shared_.window[1] = nothing;
        shared_.doubt = kMostDoubt;
        shared_.left = kUnknown;
      }
      if (in_number) {
        guess_number(law, static_cast<float>(need));
      } else {
        guess_mass(law, static_cast<float>(static_cast<double>(law.mass - need) / kMassUnit));
      }
      __syncthreads();
      const float low = shared_.window[0], high = shared_.window[1];
      if (threadIdx.x < size_ && threadIdx.x != 0) {
        float* const there = of_block(shared_.window, threadIdx.x);
        there[0] = low;
        there[1] = high;
      }
    }
    cluster_sync();
    return {in_number ? shared_.window[0] : fmaxf(shared_.window[0], law.cut), shared_.window[1]};
  }

 private:
  static constexpr uint32_t kFewTiles = 4;
  static constexpr float kBinsPerBit = 32.0f;
  static constexpr float kHeavy = 0.25f, kAllBut = 0.999f;
  static constexpr uint64_t kUnknown = ~uint64_t{0};
  static constexpr float kDoubt = 2.5f, kLeastDoubt = 0.01f, kMostDoubt = 0.9f, kWideDoubt = 0.3f;

  // From the largest elements of the lanes (32 apart), of which the block has about its share.
  __device__ __forceinline__ void guess_number(const RowLaw& law, float need) {
    const float share = need / static_cast<float>(size_), wanted = share + 3.0f * sqrtf(share) + 4.0f;
    uint32_t* const bins = &shared_.bins[0][0][0];
    const float fine = bins_of_spread(law);
    for_own([&](uint32_t local, uint32_t) {
      const float high = lane_highs_[local * kWarpSize + lane_id()];
      atomicAdd(bins + static_cast<int>(fminf((law.max - high) * fine, kSampleBins - 1.0f)), 1u);
    });
    __syncthreads();
    const float own = static_cast<float>(bins[threadIdx.x]);
    const float before = run_up(own, 0);
    if (before < wanted && before + own >= wanted && threadIdx.x + 1 < kSampleBins) {
      shared_.window[0] = law.max - static_cast<float>(threadIdx.x + 1) / fine;
    }
  }

  // Twice as far as the least of the tiles' largest elements.
  __device__ __forceinline__ float bins_of_spread(const RowLaw& law) const {
    float least = law.max;
    for (uint32_t index = lane_id(); index < tiles_; index += kWarpSize) {
      least = fminf(least, fmaxf(stats_[index].max, law.cut));
    }
    const float spread = law.max - -max_of_warp(-least);
    return spread > 0.0f ? static_cast<float>(kSampleBins) / (2.0f * spread) : 0.0f;
  }

  // Below the threshold `rest` lies, in weights of the row. A sample is counted in bins of a thirty-second of
  // a bit, the lightest first; the last has all that weigh next to nothing. The window is as wide as the
  // sample is uncertain of what lies below, by the squares of the weights; where that is much, all from there
  // on are listed. An element that is heavy by itself says nothing of those beside it: then all are listed
  // that weigh more than the others of the sample.
  __device__ __forceinline__ void guess_mass(const RowLaw& law, float rest) {
    uint32_t* const bins = &shared_.bins[0][0][0];
    const uint32_t step = size_ <= 2 ? 8 : size_ <= 4 ? 4 : size_ <= 8 ? 2 : 1;
    const float fine = law.scale * kBinsPerBit;
    uint32_t own_tiles = (tiles_ + size_ - 1) / size_;
    for_own([&](uint32_t local, uint32_t index) {
      const uint32_t shift = (index * 5 + static_cast<uint32_t>(lane_id()) * 3) % step;
#pragma unroll 2
      for (uint32_t i = shift; i < 32; i += step) {
        const uint32_t at = i % 4 * 256 + static_cast<uint32_t>(lane_id()) * 8 + i / 4;
        if (index * kTile + at >= vocab_) continue;
        const float x = element_of_lane(local, static_cast<int>(i % 4), static_cast<int>(i / 4));
        atomicAdd(bins + static_cast<int>(fminf((law.max - x) * fine, kSampleBins - 1.0f)), 1u);
      }
    });
    __syncthreads();
    const uint32_t bin = kSampleBins - 1 - threadIdx.x;
    const float share = static_cast<float>(step) * static_cast<float>(tiles_) / static_cast<float>(own_tiles);
    const float one = share * exp2f(-(static_cast<float>(bin) + 0.5f) / kBinsPerBit);
    const float own = static_cast<float>(bins[bin]) * one;
    const float below = run_up(own, 0), squares = run_up(own * one, 1);
    if (below < rest && below + own >= rest) {
      shared_.doubt = kDoubt * sqrtf(squares + own * one) / rest;
      shared_.left = own > kHeavy * rest ? __float_as_uint(kAllBut * below) : kUnknown;
    }
    __syncthreads();
    const float doubt = fminf(fmaxf(shared_.doubt, kLeastDoubt), kMostDoubt);
    float wanted = rest * (1.0f - doubt);
    if (shared_.left != kUnknown) wanted = __uint_as_float(static_cast<uint32_t>(shared_.left));
    if (sum_of_warps(0) < rest) wanted = kAllBut * sum_of_warps(0);
    find_edge(law, bin, below, own, wanted, shared_.window[0]);
    if (doubt <= kWideDoubt) find_edge(law, bin, below, own, rest * (1.0f + doubt), shared_.window[1]);
  }

  // The number below which about `wanted` lies, from the thread into whose bin it falls.
  __device__ __forceinline__ void find_edge(const RowLaw& law, uint32_t bin, float below, float own,
                                            float wanted, float& edge) const {
    if (!(below < wanted && below + own >= wanted)) return;
    const float part = (wanted - below) / own;
    edge = law.max - (static_cast<float>(bin + 1) - part) / (law.scale * kBinsPerBit);
  }

  // What the threads before this one have.
  __device__ __forceinline__ float run_up(float own, int which) {
    const float up_to = sum_up_to_lane(own);
    if (lane_id() == kWarpSize - 1) shared_.warp_floats[which][warp_] = up_to;
    __syncthreads();
    const float of_warp = shared_.warp_floats[which][lane_id()];
    const float warps = __shfl_sync(kAllLanes, sum_up_to_lane(of_warp) - of_warp, static_cast<int>(warp_));
    return warps + up_to - own;
  }
  __device__ __forceinline__ float sum_of_warps(int which) const {
    return sum_of_warp(shared_.warp_floats[which][lane_id()]);
  }
};

}  // namespace foretoken::cuda

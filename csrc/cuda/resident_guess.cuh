// About where a threshold is, from a sample of the row. What that suggests is checked in whole numbers, so it
// decides how long a search takes, never how it ends.
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

  // Into bins by weight, while nothing but this tile's largest element is known of the row: each bin has what
  // is its part of a bit above a multiple of all bins' bits. By a warp.
  __device__ __forceinline__ void sample(uint32_t local, float largest, float scale) const {
    sample(local, largest, scale, kTileBits);
  }

  // Elements worth a list; nothing is known if it is empty. `need`: so many elements, or so much mass of
  // `law.mass`. `sampled`: all tiles were, and there was a barrier of the cluster since.
  __device__ __forceinline__ Window guess(const RowLaw& law, bool in_number, uint64_t need, bool sampled) {
    const float nothing = infinity();
    if (tiles_ <= kFewTiles && tiles_ <= 2 * size_) {
      return {in_number ? -3.4028235e38f : law.cut, nothing};
    }
    if (threadIdx.x == 0 && (rank_ == 0 || !in_number)) {
      shared_.window[0] = shared_.window[1] = nothing;
      shared_.doubt = kMostDoubt;
      shared_.left = kUnknown;
    }
    if (!in_number) {
      if (!sampled || lies_far_apart(law)) sample_anew(law);
      guess_mass(law, static_cast<float>(static_cast<double>(law.mass - need) / kMassUnit));
      __syncthreads();
      return {fmaxf(shared_.window[0], law.cut), shared_.window[1]};
    }
    if (rank_ == 0) {
      this->clear_bins();
      guess_number(law, static_cast<float>(need));
      __syncthreads();
      const float low = shared_.window[0];
      if (threadIdx.x < size_ && threadIdx.x != 0) of_block(shared_.window, threadIdx.x)[0] = low;
    }
    cluster_sync();
    return {shared_.window[0], nothing};
  }

 private:
  static constexpr uint32_t kFewTiles = 4;
  static constexpr uint32_t kMostSampled = 4;  // blocks
  static constexpr float kBinsPerBit = 16.0f, kTileBits = 22.0f;
  static constexpr float kBits = kSampleBins / kBinsPerBit - 1.0f;  // but for rounding
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

  // Of a tile; so that of a row it is about as many in any cluster.
  __device__ __forceinline__ int samples_of_lane() const {
    return size_ <= kMostSampled ? 2 : size_ <= 2 * kMostSampled ? 4 : 8;
  }

  // Elements that weigh less than `bits` below `largest` are left out.
  __device__ __forceinline__ void sample(uint32_t local, float largest, float scale, float bits) const {
    if (rank_ >= kMostSampled) return;
    const float fine = scale * kBinsPerBit;
    const int number = samples_of_lane();
#pragma unroll 1
    for (int i = 0; i < number; ++i) {
      const float x = element_of_lane(local, i & 3, (lane_id() / 4 + 3 * i) & 7);
      const uint32_t bin = static_cast<uint32_t>(__float2int_rd(x * fine)) & (kSampleBins - 1);
      if ((largest - x) * scale < bits) atomicAdd(&shared_.bins[0][0][0] + bin, 1u);
    }
  }

  // Whether what was sampled of some tile may lie in bins of other weights.
  __device__ __forceinline__ bool lies_far_apart(const RowLaw& law) const {
    bool far = false;
    for (uint32_t index = lane_id(); index < tiles_; index += kWarpSize) {
      const float apart = (law.max - stats_[index].max) * law.scale;
      far = far || (apart > kBits - kTileBits && apart < infinity());
    }
    return __any_sync(kAllLanes, far) != 0;
  }

  __device__ __forceinline__ void sample_anew(const RowLaw& law) {
    cluster_sync();  // the bins may still be read
    this->clear_bins();
    for_own([&](uint32_t local, uint32_t) { sample(local, law.max, law.scale, kBits); });
    cluster_sync();
  }

  // Below the threshold `rest` lies, in weights of the row. The window is as wide as the sample is uncertain
  // of what lies below, by the squares of the weights; where that is much, all from there on are listed. An
  // element that is heavy by itself says nothing of those beside it: then all are listed that weigh more than
  // the others of the sample. Each block comes to the same.
  __device__ __forceinline__ void guess_mass(const RowLaw& law, float rest) {
    const float fine = law.scale * kBinsPerBit;
    const int top = __float2int_rd(fmaxf(law.max * fine, -1e9f));
    const int bin = top - (kSampleBins - 1) + static_cast<int>(threadIdx.x);  // the lightest first
    const uint32_t sampled = size_ < kMostSampled ? size_ : kMostSampled;
    uint32_t found = 0, of_tiles = 0;
#pragma unroll
    for (uint32_t rank = 0; rank < kMostSampled; ++rank) {
      if (rank >= sampled) continue;
      found += of_block(&shared_.bins[0][0][0], rank)[static_cast<uint32_t>(bin) & (kSampleBins - 1)];
      of_tiles += (tiles_ - rank + size_ - 1) / size_;
    }
    const float of_one = 32.0f * static_cast<float>(tiles_) / static_cast<float>(of_tiles) /
                         static_cast<float>(samples_of_lane());
    const float one = of_one * exp2f((static_cast<float>(bin - top) - 0.5f) / kBinsPerBit);
    const float own = static_cast<float>(found) * one;
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
    find_edge(bin, fine, below, own, wanted, shared_.window[0]);
    if (doubt <= kWideDoubt) find_edge(bin, fine, below, own, rest * (1.0f + doubt), shared_.window[1]);
  }

  // The number below which about `wanted` lies, from the thread into whose bin it falls.
  __device__ __forceinline__ void find_edge(int bin, float fine, float below, float own, float wanted,
                                            float& edge) const {
    if (!(below < wanted && below + own >= wanted)) return;
    edge = (static_cast<float>(bin) + (wanted - below) / own) / fine;
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

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

  // Whether what was sampled of some tile may lie in bins of other weights, `least` being the smallest of the
  // tiles' largest elements.
  __device__ __forceinline__ bool lies_far_apart(const RowLaw& law, float least) const {
    return (law.max - least) * law.scale > kBits - kTileBits;
  }

  // Of all blocks' samples, the lightest first: what lies up to each bin, and the squares of the weights.
  // Behind a barrier of the cluster; each block comes to the same.
  __device__ __forceinline__ void sum_bins(const RowLaw& law) {
    const float fine = law.scale * kBinsPerBit;
    const int bin = lightest_bin(law.max * fine) + static_cast<int>(threadIdx.x);
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
    const float one = of_one * exp2f((static_cast<float>(bin) + 0.5f - law.max * fine) / kBinsPerBit);
    const float own = static_cast<float>(found) * one;
    const float up_to = sum_up_to_lane(own), squares = sum_up_to_lane(own * one);
    float* const sums = sums_of_bins();
    sums[threadIdx.x] = up_to;
    sums[kSampleBins + threadIdx.x] = squares;
    if (lane_id() != kWarpSize - 1) return;
    shared_.warp_floats[0][warp_] = up_to;
    shared_.warp_floats[1][warp_] = squares;
  }

  // Elements worth a list; nothing is known if it is empty. `need`: so many elements, or so much mass of
  // `law.mass`. `summed`: the bins of all tiles' samples are, and there was a barrier of the block since.
  __device__ __forceinline__ Window guess(const RowLaw& law, bool in_number, uint64_t need, bool summed) {
    const float nothing = infinity();
    if (tiles_ <= kFewTiles && tiles_ <= 2 * size_) {
      return {in_number ? -3.4028235e38f : law.cut, nothing};
    }
    if (!in_number) {
      if (!summed) sample_anew(law);
      const float rest = static_cast<float>(static_cast<double>(law.mass - need) / kMassUnit);
      const Window window = guess_mass(law, rest);
      return {fmaxf(window.low, law.cut), window.high};
    }
    if (rank_ == 0) {
      if (threadIdx.x == 0) shared_.window = nothing;
      this->clear_bins();
      guess_number(law, static_cast<float>(need));
      __syncthreads();
      const float low = shared_.window;
      if (threadIdx.x < size_ && threadIdx.x != 0) *of_block(&shared_.window, threadIdx.x) = low;
    }
    cluster_sync();
    return {shared_.window, nothing};
  }

 private:
  static constexpr uint32_t kFewTiles = 4;
  static constexpr uint32_t kMostSampled = 4;  // blocks
  static constexpr float kBinsPerBit = 16.0f, kTileBits = 22.0f;
  static constexpr float kBits = kSampleBins / kBinsPerBit - 1.0f;  // but for rounding
  static constexpr float kHeavy = 0.25f, kAllBut = 0.999f;
  static constexpr float kDoubt = 3.3f, kLeastDoubt = 0.01f, kMostDoubt = 0.9f, kWideDoubt = 0.3f;

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
    const float before = run_up(own);
    if (before < wanted && before + own >= wanted && threadIdx.x + 1 < kSampleBins) {
      shared_.window = law.max - static_cast<float>(threadIdx.x + 1) / fine;
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
    return size_ <= kMostSampled ? 3 : size_ <= 2 * kMostSampled ? 6 : 12;
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

  __device__ __forceinline__ void sample_anew(const RowLaw& law) {
    cluster_sync();  // the bins may still be read
    this->clear_bins();
    for_own([&](uint32_t local, uint32_t) { sample(local, law.max, law.scale, kBits); });
    cluster_sync();
    sum_bins(law);
    __syncthreads();
  }

  // Below the threshold `rest` lies, in weights of the row. The window is as wide as the sample is uncertain
  // of what lies below, by the squares of the weights; where that is much, all from there on are listed. An
  // element that is heavy by itself says nothing of those beside it: then all are listed that weigh more than
  // the others of the sample.
  __device__ __forceinline__ Window guess_mass(const RowLaw& law, float rest) {
    if (warp_ == 0) {
      const float of_warp = shared_.warp_floats[0][lane_id()], all = sum_up_to_lane(of_warp);
      const float squares_of_warp = shared_.warp_floats[1][lane_id()];
      const Sums warps{all - of_warp, all, sum_up_to_lane(squares_of_warp) - squares_of_warp};
      const Edge edge = find_edge(warps, rest);
      float doubt = kMostDoubt, wanted = kAllBut * __shfl_sync(kAllLanes, all, kWarpSize - 1);
      if (edge.there) {
        doubt = fminf(fmaxf(kDoubt * sqrtf(edge.squares) / rest, kLeastDoubt), kMostDoubt);
        wanted = edge.own > kHeavy * rest ? kAllBut * edge.below : rest * (1.0f - doubt);
      }
      const float fine = law.scale * kBinsPerBit, more = rest * (1.0f + doubt);
      const int lightest = lightest_bin(law.max * fine);
      const float low = number_at(find_edge(warps, wanted), wanted, lightest, fine);
      const float high =
          doubt <= kWideDoubt ? number_at(find_edge(warps, more), more, lightest, fine) : infinity();
      if (lane_id() == 0) {
        shared_.edges[0] = low;
        shared_.edges[1] = high;
      }
    }
    __syncthreads();
    return {shared_.edges[0], shared_.edges[1]};
  }

  // By bin, the lightest first: of it and those before it in its warp, and behind all of these the squares.
  // Where nothing is listed yet.
  __device__ __forceinline__ float* sums_of_bins() const { return reinterpret_cast<float*>(shared_.keys); }

  static __device__ __forceinline__ int lightest_bin(float heaviest) {
    return __float2int_rd(fmaxf(heaviest, -1e9f)) - (kSampleBins - 1);
  }

  // What a lane knows of the warp of its number.
  struct Sums {
    float before, up_to, squares_before;
  };
  // The first bin up to which so much lies.
  struct Edge {
    bool there;
    int bin;
    float below, own, squares;  // before it, in it; up to it
  };
  __device__ __forceinline__ Edge find_edge(const Sums& warps, float wanted) const {
    const unsigned reached = __ballot_sync(kAllLanes, warps.up_to >= wanted);
    const int warp = reached != 0 ? __ffs(static_cast<int>(reached)) - 1 : 0;
    const float before = __shfl_sync(kAllLanes, warps.before, warp);
    const float* const sums = sums_of_bins() + warp * kWarpSize;
    const unsigned lanes = __ballot_sync(kAllLanes, before + sums[lane_id()] >= wanted);
    const int lane = lanes != 0 ? __ffs(static_cast<int>(lanes)) - 1 : kWarpSize - 1;
    const float earlier = lane > 0 ? sums[lane - 1] : 0.0f;
    return {reached != 0, warp * kWarpSize + lane, before + earlier, sums[lane] - earlier,
            __shfl_sync(kAllLanes, warps.squares_before, warp) + sums[kSampleBins + lane]};
  }

  // Below which about `wanted` lies.
  __device__ __forceinline__ float number_at(const Edge& edge, float wanted, int lightest, float fine) const {
    const float part = static_cast<float>(lightest + edge.bin) + (wanted - edge.below) / edge.own;
    return edge.there ? part / fine : infinity();
  }

  // What the threads before this one have.
  __device__ __forceinline__ float run_up(float own) {
    const float up_to = sum_up_to_lane(own);
    if (lane_id() == kWarpSize - 1) shared_.warp_floats[0][warp_] = up_to;
    __syncthreads();
    const float of_warp = shared_.warp_floats[0][lane_id()];
    const float warps = __shfl_sync(kAllLanes, sum_up_to_lane(of_warp) - of_warp, static_cast<int>(warp_));
    return warps + up_to - own;
  }
};

}  // namespace foretoken::cuda

// About where a threshold is: from the largest elements of the lanes (32 apart), of which the row has at
// least as many and as much, and from a sample of the row. What they suggest is checked in whole numbers, so
// it decides how long a search takes, never how it ends.
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
  // `law.mass`. The bins are empty before, and are not behind it.
  __device__ __forceinline__ Window guess(const RowLaw& law, bool in_number, uint64_t need) {
    const float nothing = infinity();
    if (tiles_ <= kFewTiles && tiles_ <= 2 * size_) {
      return {in_number ? -3.4028235e38f : law.cut, nothing};
    }
    const float fine = in_number ? bins_of_spread(law) : law.scale * kHighBinsPerBit;
    count(law, fine, !in_number);
    cluster_sync();
    const Running running = add_up(law, in_number);
    const float wanted =
        in_number ? 0.0f : static_cast<float>(static_cast<double>(law.mass - need) / kMassUnit);
    const float least =
        in_number ? static_cast<float>(need) : static_cast<float>(static_cast<double>(need) / kMassUnit);
    if (threadIdx.x == 0) {
      shared_.window[0] = shared_.window[1] = shared_.list_low = nothing;
      shared_.doubt = kMostDoubt;
      shared_.listed = ~0u;
    }
    __syncthreads();
    if (running.high < least && running.high + running.of_high >= least && threadIdx.x + 1 < kResidentBins) {
      shared_.list_low = law.max - static_cast<float>(threadIdx.x + 1) / fine;
      shared_.listed = running.highs;
    }
    if (running.below < wanted && running.below + running.own >= wanted) {
      shared_.doubt = kDoubt * sqrtf(running.squares) / wanted;
    }
    __syncthreads();
    const uint32_t highs = shared_.listed;
    const Window list{shared_.list_low, nothing};
    if (in_number) return highs <= kMostHighs ? list : Window{nothing, nothing};
    if (highs <= kFewHighs) return list;
    const float doubt = fminf(fmaxf(shared_.doubt, kLeastDoubt), kMostDoubt);
    find_edge(law, running, wanted * (1.0f - doubt), shared_.window[0]);
    find_edge(law, running, wanted * (1.0f + doubt), shared_.window[1]);
    __syncthreads();
    const Window window{fmaxf(shared_.window[0], law.cut), shared_.window[1]};
    if (window.low < window.high && window.high < nothing) return window;
    return highs <= kMostHighs ? list : Window{nothing, nothing};
  }

 private:
  static constexpr uint32_t kFewTiles = 4;
  static constexpr uint32_t kFewHighs = 768, kMostHighs = 2048;
  static constexpr float kHighBinsPerBit = 8.0f, kSampleBinsPerBit = 32.0f;
  static constexpr float kDoubt = 2.5f, kLeastDoubt = 0.01f, kMostDoubt = 0.3f;
  static constexpr int kSamples = 4;  // of a lane's 32 elements

  // Sums over bins from one end on: what lies before this thread's, and what those hold.
  struct Running {
    float below, own;     // of the sample, from the lightest on: estimated weight
    float squares;        // behind this thread's bins
    float first;          // of own: of the lighter one of two bins
    float high, of_high;  // of the lanes' largest, from the heaviest on: weight at least, or number
    uint32_t highs;       // up to and with this thread's bin
  };

  // Twice as far as the least of the tiles' largest elements.
  __device__ __forceinline__ float bins_of_spread(const RowLaw& law) const {
    float least = law.max;
    for (uint32_t index = lane_id(); index < tiles_; index += kWarpSize) {
      least = fminf(least, fmaxf(stats_[index].max, law.cut));
    }
    const float spread = law.max - -max_of_warp(-least);
    return spread > 0.0f ? static_cast<float>(kResidentBins) / (2.0f * spread) : 0.0f;
  }

  __device__ __forceinline__ void count(const RowLaw& law, float fine, bool samples) const {
    uint32_t* const of_samples = &shared_.bins[0][0][0];
    uint32_t* const of_highs = &shared_.bins[1][0][0];
    const float sample_fine = law.scale * kSampleBinsPerBit;
    for_own([&](uint32_t local, uint32_t index) {
      const float high = lane_highs_[local * kWarpSize + lane_id()];
      atomicAdd(of_highs + static_cast<int>(fminf((law.max - high) * fine, kResidentBins - 1.0f)), 1u);
      if (!samples) return;
      const uint32_t shift = (index * 5 + static_cast<uint32_t>(lane_id()) * 3) % 8;
#pragma unroll
      for (int i = 0; i < kSamples; ++i) {
        if (index * kTile + i * 256 + lane_id() * 8 + shift >= vocab_) continue;
        const float x = element_of_lane(local, i, static_cast<int>(shift));
        atomicAdd(of_samples + static_cast<int>(fminf((law.max - x) * sample_fine, kSampleBins - 1.0f)), 1u);
      }
    });
  }

  __device__ __forceinline__ Running add_up(const RowLaw& law, bool in_number) {
    uint32_t lighter = 0, heavier = 0, highs = 0;
#pragma unroll 1
    for (uint32_t rank = 0; rank < size_; ++rank) {
      const uint32_t* const bins = of_block(&shared_.bins[0][0][0], rank);
      if (!in_number) {
        lighter += bins[kSampleBins - 1 - 2 * threadIdx.x];
        heavier += bins[kSampleBins - 2 - 2 * threadIdx.x];
      }
      highs += bins[kParts * kResidentBins + threadIdx.x];
    }
    const float share = 32.0f / kSamples;
    const float middle = (static_cast<float>(kSampleBins - 1 - 2 * static_cast<int>(threadIdx.x)) + 0.5f);
    const float of_lighter = share * exp2f(-middle / kSampleBinsPerBit);
    const float of_heavier = share * exp2f((1.0f - middle) / kSampleBinsPerBit);
    Running running{};
    running.first = static_cast<float>(lighter) * of_lighter;
    running.own = running.first + static_cast<float>(heavier) * of_heavier;
    running.of_high = static_cast<float>(highs);
    if (!in_number) running.of_high *= exp2f(-(static_cast<float>(threadIdx.x) + 1.0f) / kHighBinsPerBit);
    const float squares = running.first * of_lighter + static_cast<float>(heavier) * of_heavier * of_heavier;
    const float values[3] = {running.own, squares, running.of_high};
    float before[3];
    run_up(values, before, highs);
    running.below = before[0];
    running.squares = before[1] + squares;
    running.high = before[2];
    running.highs = highs;
    return running;
  }

  // What lies before each thread, where each begins with the very number that the one before it ends with;
  // of the last with its own.
  __device__ __forceinline__ void run_up(const float (&values)[3], float (&before)[3], uint32_t& number) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      float up_to = values[i];
#pragma unroll
      for (int step = 1; step < kWarpSize; step *= 2) {
        const float other = __shfl_up_sync(kAllLanes, up_to, step);
        if (lane_id() >= step) up_to += other;
      }
      if (lane_id() == kWarpSize - 1) shared_.warp_floats[i][warp_] = up_to;
      before[i] = __shfl_up_sync(kAllLanes, up_to, 1);
      if (lane_id() == 0) before[i] = 0.0f;
    }
    number = sum_up_to_lane(number);
    if (lane_id() == kWarpSize - 1) shared_.warp_counts[warp_] = number;
    __syncthreads();
    float warps[3] = {0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (uint32_t warp = 0; warp < warp_; ++warp) {
#pragma unroll
      for (int i = 0; i < 3; ++i) warps[i] += shared_.warp_floats[i][warp];
      number += shared_.warp_counts[warp];
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) before[i] += warps[i];
  }

  // The number below which about `wanted` lies, from whichever thread's bins it falls into.
  __device__ __forceinline__ void find_edge(const RowLaw& law, const Running& running, float wanted,
                                            float& edge) const {
    if (!(running.below < wanted && running.below + running.own >= wanted)) return;
    const float inside = wanted - running.below, second = running.own - running.first;
    const int lighter = kSampleBins - 1 - 2 * static_cast<int>(threadIdx.x);
    const float part =
        inside <= running.first ? inside / running.first : 1.0f + (inside - running.first) / second;
    edge = law.max - (static_cast<float>(lighter + 1) - part) / (law.scale * kSampleBinsPerBit);
  }
};

}  // namespace foretoken::cuda

// From a row of logits to its law, by the blocks of a cluster together. The numbers are those of cpu/rows.cpp
// and cpu/filters.cpp, bit by bit: tile sums in their pinned order, everything across tiles in integers.
#pragma once

#include "cuda/cluster.cuh"
#include "cuda/tile.cuh"

namespace foretoken::cuda {

constexpr int kMaxTiles = 1024;  // kMaxVocab / kTile, rounded up
constexpr int kBins = 1024;

struct Filters {
  float temperature;
  int32_t top_k;
  float top_p, min_p;
};

// Shared memory of a block. Tiles are dealt out round: tile t belongs to block t % size, there to warp
// t / size % kWarps.
struct RowScratch {
  float tile_max[kMaxTiles];  // of this block's tiles, by t / size
  float tile_sum[kMaxTiles];
  uint64_t bins[kBins];  // of this block, and after a search of the whole cluster
  uint64_t warp_words[kWarps];
  uint64_t slot_words[2][kMaxCluster];
  float warp_floats[kWarps];
  float slot_floats[2][kMaxCluster];
  int32_t turn;  // which of the two slots is next; the same in every block
};

__device__ inline float minus_infinity() { return -__int_as_float(0x7F800000); }

// Order-preserving: larger floats have larger keys.
__device__ inline uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

template <DType kType>
class ClusterRow {
 public:
  __device__ ClusterRow(const DeviceRow& row, RowScratch& scratch)
      : row_(row),
        scratch_(scratch),
        rank_(cluster_rank()),
        size_(cluster_size()),
        tiles_((row.size + kTile - 1) / kTile) {}

  __device__ RowLaw law(const Filters& filters) {
    if (filters.temperature == 0.0f) return greedy_law();
    RowLaw law;
    law.kind = LawKind::logits;
    law.scale = logits_scale(filters.temperature);
    reach_ = 125.0 / static_cast<double>(law.scale);
    if (!summarise(law)) {
      RowLaw none;
      none.usable = false;
      none.top = lowest_of(law.max);
      return none;
    }
    const float floor = logits_floor(law.max, law.scale);
    law.cut = floor;
    const bool filtered =
        (filters.top_k > 0 && filters.top_k < row_.size) || filters.top_p < 1.0f || filters.min_p > 0.0f;
    if (filtered) law.cut = fmaxf(floor, filter_cut(law, filters, floor));
    if (law.cut > floor) sum_again(law);
    law.mass = mass_of_tiles(law);
    return law;
  }

  // The token of 64 random bits; every thread of the cluster has it.
  __device__ int64_t draw(const RowLaw& law, uint64_t bits, uint64_t* tile_masses) {
    for_tiles([&](int64_t index, int64_t slot, bool leader) {
      uint64_t mass = 0;
      if (scratch_.tile_max[slot] >= law.cut) {
        LaneTile tile;
        load_tile<kType>(row_, index, minus_infinity(), tile);
        mass = mass_sum_of_tile(tile, [&](float x) { return mass_in(law, x); });
      }
      if (leader) *of_block(&tile_masses[index], 0) = mass;
    });
    cluster_sync();
    uint64_t found = 0;
    if (rank_ == 0 && threadIdx.x < 32) found = static_cast<uint64_t>(pick(law, bits, tile_masses));
    return static_cast<int64_t>(all(found, [](uint64_t a, uint64_t b) { return a > b ? a : b; }));
  }

  __device__ float at(int64_t token) const { return element_at<kType>(row_, token); }

 private:
  static __device__ uint64_t mass_in(const RowLaw& law, float x) {
    return mass_of(weight_of_logit(x, law.max, law.scale, law.cut));
  }

  // body(tile, its number in this block, whether this is the warp's first lane)
  template <class Body>
  __device__ void for_tiles(Body body) {
    for (int64_t slot = threadIdx.x / 32; slot * size_ + rank_ < tiles_; slot += kWarps) {
      body(slot * size_ + rank_, slot, threadIdx.x % 32 == 0);
    }
  }

  template <class Combine>
  __device__ uint64_t all(uint64_t mine, Combine combine) {
    const int turn = turn_ & 1;
    ++turn_;
    return combine_cluster(mine, uint64_t{0}, combine, scratch_.warp_words, scratch_.slot_words[turn]);
  }

  __device__ uint64_t total(uint64_t mine_of_leader) {
    const uint64_t mine = threadIdx.x % 32 == 0 ? mine_of_leader : 0;
    return all(mine, [](uint64_t a, uint64_t b) { return a + b; });
  }

  // Largest element with the lowest tile it stands in, and whether anything is irregular, in one word.
  __device__ bool summarise(RowLaw& law) {
    bool regular = true;
    float high = minus_infinity();
    for_tiles([&](int64_t index, int64_t slot, bool leader) {
      LaneTile tile;
      load_tile<kType>(row_, index, minus_infinity(), tile);
      const WarpMax max = max_of_tile(tile);
      const float anchor = max.max > minus_infinity() ? max.max : 0.0f;
      const float floor = static_cast<float>(static_cast<double>(anchor) - reach_);
      const float sum =
          sum_of_tile(tile, [&](float x) { return weight_of_logit(x, anchor, law.scale, floor); });
      if (leader) {
        scratch_.tile_max[slot] = max.max;
        scratch_.tile_sum[slot] = sum;
      }
      regular = regular && max.max < __int_as_float(0x7F800000) && !max.has_nan;
      high = fmaxf(high, max.max);
    });
    const uint64_t mine = static_cast<uint64_t>(key_of(high)) << 1 | (regular ? 0u : 1u);
    const uint64_t found =
        all(mine, [](uint64_t a, uint64_t b) { return (a > b ? a : b) >> 1 << 1 | ((a | b) & 1u); });
    law.max = value_of(static_cast<uint32_t>(found >> 1));
    return (found & 1u) == 0 && law.max > minus_infinity();
  }

  // Lowest id that holds `high`; 0 if the row has nothing but NaN and -infinity.
  __device__ int64_t lowest_of(float high) {
    uint64_t best = 0;  // inverted, so that the largest wins
    if (high > minus_infinity()) {
      for_tiles([&](int64_t index, int64_t slot, bool) {
        if (scratch_.tile_max[slot] != high) return;
        LaneTile tile;
        load_tile<kType>(row_, index, minus_infinity(), tile);
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const uint64_t inverted = ~static_cast<uint64_t>(index * kTile + LaneTile::element_of(i));
          if (tile.x[i] == high && inverted > best) best = inverted;
        }
      });
    }
    const uint64_t found = all(best, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
    return found == 0 ? 0 : static_cast<int64_t>(~found);
  }

  __device__ RowLaw greedy_law() {
    RowLaw law;
    law.kind = LawKind::point;
    bool nan = false;
    float high = minus_infinity();
    for_tiles([&](int64_t index, int64_t slot, bool leader) {
      LaneTile tile;
      load_tile<kType>(row_, index, minus_infinity(), tile);
      const WarpMax max = max_of_tile(tile);
      if (leader) scratch_.tile_max[slot] = max.max;
      nan |= max.has_nan;
      high = fmaxf(high, max.max);
    });
    const uint64_t found =
        all(static_cast<uint64_t>(key_of(high)) << 1 | (nan ? 1u : 0u),
            [](uint64_t a, uint64_t b) { return (a > b ? a : b) >> 1 << 1 | ((a | b) & 1u); });
    high = value_of(static_cast<uint32_t>(found >> 1));
    law.top = lowest_of(high);
    law.usable = (found & 1u) == 0 && high > minus_infinity();
    return law;
  }

  // The sums of the first pass contain what the filters have removed since.
  __device__ void sum_again(const RowLaw& law) {
    for_tiles([&](int64_t index, int64_t slot, bool leader) {
      const float anchor = scratch_.tile_max[slot];
      if (anchor < law.cut) return;
      const float cut = fmaxf(law.cut, static_cast<float>(static_cast<double>(anchor) - reach_));
      LaneTile tile;
      load_tile<kType>(row_, index, minus_infinity(), tile);
      const float sum =
          sum_of_tile(tile, [&](float x) { return weight_of_logit(x, anchor, law.scale, cut); });
      if (leader) scratch_.tile_sum[slot] = sum;
    });
  }

  __device__ uint64_t mass_of_tiles(const RowLaw& law) {
    uint64_t mass = 0;
    for_tiles([&](int64_t, int64_t slot, bool) {
      const float anchor = scratch_.tile_max[slot];
      if (anchor < law.cut) return;
      mass += mass_of_tile(scratch_.tile_sum[slot], weight_of_logit(anchor, law.max, law.scale, law.cut));
    });
    return total(mass);
  }

  __device__ static float distance_of_weight(double weight, float scale) {
    return static_cast<float>(log_positive(weight) * kLog2E / static_cast<double>(scale));
  }

  __device__ float filter_cut(const RowLaw& law, const Filters& filters, float floor) {
    float kept_from = minus_infinity();
    if (filters.top_k > 0 && filters.top_k < row_.size) {
      kept_from = reaching(minus_infinity(), law.max, static_cast<uint64_t>(filters.top_k),
                           [](float) { return uint64_t{1}; });
    }
    float cut = kept_from;
    if (filters.top_p < 1.0f) cut = fmaxf(cut, top_p_cut(law, filters.top_p, kept_from, floor));
    if (filters.min_p > 0.0f) {
      cut = fmaxf(cut, law.max + distance_of_weight(static_cast<double>(filters.min_p), law.scale));
    }
    return cut;
  }

  __device__ float top_p_cut(const RowLaw& law, float top_p, float kept_from, float floor) {
    RowLaw whole = law;
    whole.cut = fmaxf(floor, kept_from);
    float bound = whole.cut;
    uint64_t mass = 0;
    if (kept_from == minus_infinity()) {
      mass = mass_of_tiles(whole);
      // What can never be needed, see cpu/filters.cpp.
      const double light = 0.5 * (1.0 - static_cast<double>(top_p)) *
                           (static_cast<double>(mass) / kMassUnit) / static_cast<double>(row_.size);
      if (light > 1e-30) bound = fmaxf(bound, law.max + distance_of_weight(light, law.scale));
      bound = fminf(bound, law.max);
    } else {
      bound = fminf(bound, law.max);
      uint64_t mine = 0;
      for_tiles([&](int64_t index, int64_t slot, bool) {
        if (scratch_.tile_max[slot] < bound) return;
        LaneTile tile;
        load_tile<kType>(row_, index, minus_infinity(), tile);
        mine += mass_sum_of_tile(tile, [&](float x) { return x >= bound ? mass_in(whole, x) : 0; });
      });
      mass = total(mine);
    }
    uint64_t need = static_cast<uint64_t>(static_cast<double>(top_p) * static_cast<double>(mass));
    if (need == 0) need = 1;
    return reaching(bound, law.max, need, [&](float x) { return mass_in(whole, x); });
  }

  // Largest threshold t >= low such that the elements >= t together have `need`; -infinity if all do not.
  // Each round spreads the elements in question over bins of equal width in key space and goes on in the bin
  // that holds the answer. Integers: neither order nor bins matter.
  template <class Measure>
  __device__ float reaching(float low, float high, uint64_t need, Measure measure) {
    uint32_t top = key_of(high), bottom = key_of(low);
    while (true) {
      const uint32_t span = top - bottom;
      const int shift = span < kBins ? 0 : 32 - __clz(static_cast<int>(span)) - 10;
      histogram(bottom, top, shift, measure);
      uint64_t before = 0;
      const int bin = bin_reaching(need, before);
      if (bin < 0) return minus_infinity();
      need -= before;
      top -= static_cast<uint32_t>(bin) << shift;
      if (shift == 0) return value_of(top);
      const uint32_t last = top - ((1u << shift) - 1);
      bottom = last > bottom && last <= top ? last : bottom;
    }
  }

  // scratch_.bins of block 0: what all elements with keys in [bottom, top] measure, by (top - key) >> shift.
  template <class Measure>
  __device__ void histogram(uint32_t bottom, uint32_t top, int shift, Measure measure) {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) scratch_.bins[bin] = 0;
    cluster_sync();
    for_tiles([&](int64_t index, int64_t slot, bool) {
      if (key_of(scratch_.tile_max[slot]) < bottom) return;
      LaneTile tile;
      load_tile<kType>(row_, index, minus_infinity(), tile);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const uint32_t key = key_of(tile.x[i]);
        if (key < bottom || key > top || index * kTile + LaneTile::element_of(i) >= row_.size) continue;
        const uint64_t amount = measure(tile.x[i]);
        if (amount > 0) {
          atomicAdd(reinterpret_cast<unsigned long long*>(&scratch_.bins[(top - key) >> shift]),
                    static_cast<unsigned long long>(amount));
        }
      }
    });
    __syncthreads();
    if (rank_ != 0) {
      for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
        if (scratch_.bins[bin] > 0) {
          atomicAdd(reinterpret_cast<unsigned long long*>(of_block(&scratch_.bins[bin], 0)),
                    static_cast<unsigned long long>(scratch_.bins[bin]));
        }
      }
    }
    cluster_sync();
  }

  // First bin at which the running sum reaches `need`, and the sum before it; -1 if none.
  __device__ int bin_reaching(uint64_t need, uint64_t& before) {
    constexpr int kEach = kBins / kThreads;
    uint64_t found = 0, sum = 0;
    if (rank_ == 0) {
      uint64_t mine = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) mine += scratch_.bins[threadIdx.x * kEach + i];
      uint64_t inclusive = mine;
      for (int step = 1; step < 32; step *= 2) {
        const uint64_t lower = __shfl_up_sync(kAllLanes, inclusive, step);
        if (static_cast<int>(threadIdx.x % 32) >= step) inclusive += lower;
      }
      if (threadIdx.x % 32 == 31) scratch_.warp_words[threadIdx.x / 32] = inclusive;
      __syncthreads();
      for (unsigned warp = 0; warp < threadIdx.x / 32; ++warp) inclusive += scratch_.warp_words[warp];
      uint64_t at = inclusive - mine;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const uint64_t next = at + scratch_.bins[threadIdx.x * kEach + i];
        if (at < need && need <= next) {
          found = static_cast<uint64_t>(threadIdx.x * kEach + i) + 1;
          sum = at;
        }
        at = next;
      }
      __syncthreads();
    }
    const auto largest = [](uint64_t a, uint64_t b) { return a > b ? a : b; };
    found = all(found, largest);
    before = all(sum, largest);
    return static_cast<int>(found) - 1;
  }

  // By the first warp of block 0.
  __device__ int64_t pick(const RowLaw& law, uint64_t bits, const uint64_t* tile_masses) {
    uint64_t total = 0;
    for (int64_t index = threadIdx.x; index < tiles_; index += 32) total += tile_masses[index];
    for (int step = 16; step >= 1; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
    uint64_t left = multiply_high(bits, total);  // uniform in [0, total)
    for (int64_t first = 0; first < tiles_; first += 32) {
      const int64_t index = first + threadIdx.x;
      const uint64_t mine = index < tiles_ ? tile_masses[index] : 0;
      uint64_t inclusive = mine;
      for (int step = 1; step < 32; step *= 2) {
        const uint64_t lower = __shfl_up_sync(kAllLanes, inclusive, step);
        if (static_cast<int>(threadIdx.x) >= step) inclusive += lower;
      }
      const uint64_t run = __shfl_sync(kAllLanes, inclusive, 31);
      if (left >= run) {
        left -= run;
        continue;
      }
      const unsigned holders = __ballot_sync(kAllLanes, left < inclusive);
      const int owner = __ffs(static_cast<int>(holders)) - 1;
      left -= __shfl_sync(kAllLanes, inclusive - mine, owner);
      LaneTile tile;
      load_tile<kType>(row_, first + owner, minus_infinity(), tile);
      return (first + owner) * kTile + find_in_tile(tile, [&](float x) { return mass_in(law, x); }, left);
    }
    return 0;
  }

  const DeviceRow row_;
  RowScratch& scratch_;
  const uint32_t rank_, size_;
  const int64_t tiles_;
  double reach_ = 0.0;
  int turn_ = 0;
};

}  // namespace foretoken::cuda

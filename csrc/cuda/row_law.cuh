// From a row of logits to its law, by the blocks of a cluster together. The numbers are those of cpu/rows.cpp
// and cpu/filters.cpp, bit by bit: tile sums in their pinned order, everything across tiles in integers.
#pragma once

#include "cuda/cluster.cuh"
#include "cuda/tile.cuh"

namespace foretoken::cuda {

constexpr int kMaxTiles = 1024;  // kMaxVocab / kTile, rounded up
constexpr int kBins = 1024;
constexpr int kList = 4096;

struct Filters {
  float temperature;
  int32_t top_k;
  float top_p, min_p;
};

// Shared memory of a block. Tiles are dealt out round: tile t belongs to block t % size, there to warp
// t / size % kWarps. What is marked "first" is used in block 0 alone, and written there by all.
struct RowScratch {
  float tile_max[kMaxTiles];  // of this block's tiles, by t / size
  float tile_sum[kMaxTiles];
  float all_max[kMaxTiles];       // first: of all tiles
  uint64_t tile_mass[kMaxTiles];  // first: integer masses, for the draw
  uint64_t bins[kBins];
  uint32_t list[kList];        // first: keys of the elements among which a threshold lies
  int32_t listed;              // first: how many there are; more than kList: the list is of no use
  uint64_t part[kMaxCluster];  // first: a share of a sum from each block
  uint64_t found[2];           // first: of a search through the bins
  uint64_t answer[2];          // what block 0 tells everyone
  uint64_t warp_words[kWarps];
  uint64_t slot_words[2][kMaxCluster];
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
        tiles_((row.size + kTile - 1) / kTile) {
    clear_bins();
    if (threadIdx.x == 0) scratch_.listed = 0;
  }

  // All but the mass, which draw() finds on its way.
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
    return law;
  }

  // The token of 64 random bits, and the law's mass; in the first warp of block 0 alone.
  __device__ int64_t draw(RowLaw& law, uint64_t bits) {
    const uint64_t mine = block_sum(mass_of_own_tiles(law));
    if (threadIdx.x == 0) *of_block(&scratch_.part[rank_], 0) = mine;
    for_tiles([&](int64_t index, int64_t slot, bool leader) {
      uint64_t mass = 0;
      if (scratch_.tile_max[slot] >= law.cut) {
        LaneTile tile;
        load_tile<kType>(row_, index, minus_infinity(), tile);
        mass = mass_sum_of_tile(tile, [&](float x) { return mass_in(law, x); });
      }
      if (leader) *of_block(&scratch_.tile_mass[index], 0) = mass;
    });
    cluster_sync();
    if (rank_ != 0 || threadIdx.x >= 32) return -1;
    law.mass = 0;
    for (uint32_t rank = 0; rank < size_; ++rank) law.mass += scratch_.part[rank];
    return pick(law, bits, scratch_.tile_mass);
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

  // Of a number that every lane of a warp holds; valid in thread 0.
  __device__ uint64_t block_sum(uint64_t of_warp) {
    if (threadIdx.x % 32 == 0) scratch_.warp_words[threadIdx.x / 32] = of_warp;
    __syncthreads();
    uint64_t sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += scratch_.warp_words[warp];
    return sum;
  }

  // Two words from thread 0 of block 0 to everyone. The third barrier in a row may reuse the place.
  __device__ void tell(uint64_t first, uint64_t second) {
    __syncthreads();
    if (rank_ == 0 && threadIdx.x == 0) {
      for (uint32_t rank = 0; rank < size_; ++rank) {
        uint64_t* place = of_block(scratch_.answer, rank);
        place[0] = first;
        place[1] = second;
      }
    }
    cluster_sync();
  }

  __device__ void clear_bins() {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) scratch_.bins[bin] = 0;
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
        *of_block(&scratch_.all_max[index], 0) = max.max;
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

  __device__ uint64_t mass_of_own_tiles(const RowLaw& law) {
    uint64_t mass = 0;
    for_tiles([&](int64_t, int64_t slot, bool) {
      const float anchor = scratch_.tile_max[slot];
      if (anchor < law.cut) return;
      mass += mass_of_tile(scratch_.tile_sum[slot], weight_of_logit(anchor, law.max, law.scale, law.cut));
    });
    return mass;
  }

  __device__ static float distance_of_weight(double weight, float scale) {
    return static_cast<float>(log_positive(weight) * kLog2E / static_cast<double>(scale));
  }

  __device__ float filter_cut(const RowLaw& law, const Filters& filters, float floor) {
    float kept_from = minus_infinity();
    if (filters.top_k > 0 && filters.top_k < row_.size) {
      const bool few = filters.top_k <= tiles_;
      kept_from = reaching(few ? kth_of_tiles(filters.top_k) : minus_infinity(), law.max,
                           static_cast<uint64_t>(filters.top_k), few, [](float) { return uint64_t{1}; });
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
      mass = total(mass_of_own_tiles(whole));
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
    return reaching(bound, law.max, need, false, [&](float x) { return mass_in(whole, x); });
  }

  // The k-th largest maximum of a tile: the k-th largest element is no smaller.
  __device__ float kth_of_tiles(int32_t k) {
    uint32_t found = 0;
    if (rank_ == 0) {
      for (int64_t mine = threadIdx.x; mine < tiles_; mine += kThreads) {
        int32_t before = 0;
        for (int64_t other = 0; other < tiles_; ++other) {
          const bool larger = scratch_.all_max[other] > scratch_.all_max[mine];
          before += larger || (scratch_.all_max[other] == scratch_.all_max[mine] && other < mine) ? 1 : 0;
        }
        if (before == k - 1) scratch_.list[0] = key_of(scratch_.all_max[mine]);
      }
      __syncthreads();
      found = scratch_.list[0];
    }
    tell(found, 0);
    return value_of(static_cast<uint32_t>(scratch_.answer[0]));
  }

  // Largest threshold t >= low such that the elements >= t together have `need`; -infinity if all do not. The
  // elements in question are spread over bins of equal width in key space; those of the bin that holds the
  // answer, or all if they are expected to be `few`, are listed in block 0, which finishes alone. Integers:
  // neither order nor bins matter.
  template <class Measure>
  __device__ float reaching(float low, float high, uint64_t need, bool few, Measure measure) {
    uint32_t top = key_of(high), bottom = key_of(low);
    while (true) {
      if (!few) {
        const int shift = shift_for(bottom, top);
        count_elements(bottom, top, shift, measure);
        uint64_t before = 0;
        const int64_t bin = rank_ == 0 ? bin_reaching(need, before) : 0;
        tell(static_cast<uint64_t>(bin), before);
        if (static_cast<int64_t>(scratch_.answer[0]) < 0) return minus_infinity();
        need -= scratch_.answer[1];
        narrow(bottom, top, shift, static_cast<uint32_t>(scratch_.answer[0]));
        if (shift == 0) return value_of(top);
      }
      list_elements(bottom, top);
      const bool overflow = rank_ == 0 && scratch_.listed > kList;
      const uint64_t found = rank_ == 0 && !overflow ? finish(bottom, top, need, measure) : 0;
      __syncthreads();
      if (threadIdx.x == 0) scratch_.listed = 0;
      tell(found, overflow ? 1 : 0);
      if (scratch_.answer[1] == 0) return value_of(static_cast<uint32_t>(scratch_.answer[0]));
      few = false;
    }
  }

  static __device__ int shift_for(uint32_t bottom, uint32_t top) {
    const uint32_t span = top - bottom;
    return span < kBins ? 0 : 32 - __clz(static_cast<int>(span)) - 10;
  }

  static __device__ void narrow(uint32_t& bottom, uint32_t& top, int shift, uint32_t bin) {
    top -= bin << shift;
    const uint32_t last = top - ((1u << shift) - 1);
    bottom = last > bottom && last <= top ? last : bottom;
  }

  __device__ void add_to_bin(uint64_t* bins, uint32_t bin, uint64_t amount) {
    if (amount > 0)
      atomicAdd(reinterpret_cast<unsigned long long*>(&bins[bin]), static_cast<unsigned long long>(amount));
  }

  // body(key) for the elements of this block with keys in [bottom, top].
  template <class Body>
  __device__ void for_keys(uint32_t bottom, uint32_t top, Body body) {
    for_tiles([&](int64_t index, int64_t slot, bool) {
      if (key_of(scratch_.tile_max[slot]) < bottom) return;
      LaneTile tile;
      load_tile<kType>(row_, index, minus_infinity(), tile);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const uint32_t key = key_of(tile.x[i]);
        if (key < bottom || key > top || index * kTile + LaneTile::element_of(i) >= row_.size) continue;
        body(key, tile.x[i]);
      }
    });
  }

  // Bins of block 0: what all elements with keys in [bottom, top] measure, by (top - key) >> shift. Bins are
  // empty before, everywhere; behind it they are so again in all blocks but the first.
  template <class Measure>
  __device__ void count_elements(uint32_t bottom, uint32_t top, int shift, Measure measure) {
    for_keys(bottom, top,
             [&](uint32_t key, float x) { add_to_bin(scratch_.bins, (top - key) >> shift, measure(x)); });
    if (rank_ != 0) {
      __syncthreads();
      uint64_t* first = of_block(scratch_.bins, 0);
      for (int bin = threadIdx.x; bin < kBins; bin += kThreads) add_to_bin(first, bin, scratch_.bins[bin]);
      clear_bins();
    }
    cluster_sync();
  }

  __device__ void list_elements(uint32_t bottom, uint32_t top) {
    int32_t* listed = of_block(&scratch_.listed, 0);
    uint32_t* list = of_block(scratch_.list, 0);
    for_keys(bottom, top, [&](uint32_t key, float) {
      const int32_t place = atomicAdd(listed, 1);
      if (place < kList) list[place] = key;
    });
    cluster_sync();
  }

  // The key of the threshold among the listed ones, by block 0; that of -infinity if there is none.
  template <class Measure>
  __device__ uint64_t finish(uint32_t bottom, uint32_t top, uint64_t need, Measure measure) {
    const int32_t listed = scratch_.listed;
    while (true) {
      const int shift = shift_for(bottom, top);
      for (int i = threadIdx.x; i < listed; i += kThreads) {
        const uint32_t key = scratch_.list[i];
        if (key >= bottom && key <= top)
          add_to_bin(scratch_.bins, (top - key) >> shift, measure(value_of(key)));
      }
      __syncthreads();
      uint64_t before = 0;
      const int64_t bin = bin_reaching(need, before);
      if (bin < 0) return key_of(minus_infinity());
      need -= before;
      narrow(bottom, top, shift, static_cast<uint32_t>(bin));
      if (shift == 0) return top;
    }
  }

  // First bin of this block at which the running sum reaches `need`, and the sum before it; -1 if none.
  // Clears the bins.
  __device__ int64_t bin_reaching(uint64_t need, uint64_t& before) {
    constexpr int kEach = kBins / kThreads;
    uint64_t own[kEach], mine = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) mine += own[i] = scratch_.bins[threadIdx.x * kEach + i];
    uint64_t inclusive = mine;
    for (int step = 1; step < 32; step *= 2) {
      const uint64_t lower = __shfl_up_sync(kAllLanes, inclusive, step);
      if (static_cast<int>(threadIdx.x % 32) >= step) inclusive += lower;
    }
    if (threadIdx.x % 32 == 31) scratch_.warp_words[threadIdx.x / 32] = inclusive;
    if (threadIdx.x == 0) scratch_.found[0] = ~uint64_t{0};
    __syncthreads();
    clear_bins();
    for (unsigned warp = 0; warp < threadIdx.x / 32; ++warp) inclusive += scratch_.warp_words[warp];
    uint64_t at = inclusive - mine;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (at < need && need <= at + own[i]) {
        scratch_.found[0] = static_cast<uint64_t>(threadIdx.x * kEach + i);
        scratch_.found[1] = at;
      }
      at += own[i];
    }
    __syncthreads();
    before = scratch_.found[1];
    return static_cast<int64_t>(scratch_.found[0]);
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

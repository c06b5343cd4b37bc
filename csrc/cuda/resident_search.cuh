// What a cluster finds out about the row that lies in its shared memory: masses of what lies above a
// number, lists of what lies near one, and the largest element at which a measure is reached. All of it in
// whole numbers, so neither order nor route changes a threshold. Every member is called by all threads of the
// cluster, which all come to the same results.
#pragma once

#include "cuda/resident_row.cuh"

namespace foretoken::cuda {

template <DType kType>
class ResidentSearch : protected ResidentRow<kType> {
 protected:
  using Row = ResidentRow<kType>;
  using Row::args_;
  using Row::first_marked;
  using Row::for_marked;
  using Row::for_own;
  using Row::lane_highs_;
  using Row::mark;
  using Row::masses_;
  using Row::quarter_of;
  using Row::rank_;
  using Row::shared_;
  using Row::size_;
  using Row::stats_;
  using Row::tiles_;
  using Row::vocab_;
  using Row::warp_;

  __device__ __forceinline__ ResidentSearch(const ChainArgs& args, unsigned char* memory)
      : Row(args, memory) {}

  // Elements in [low, high).
  struct Window {
    float low, high;
  };

  // What the whole block knows of all blocks.
  struct Collected {
    uint64_t mass;    // of what lies at the window's end or above
    uint32_t listed;  // elements in the window
    bool whole;       // all of them found room
  };

  // Lists the elements in a window, and adds up the masses of those above; of this block's tiles the masses
  // are in masses_ too. Between two of these lies another barrier of the cluster.
  __device__ __forceinline__ Collected collect(const RowLaw& law, const Window window) {
    const float max = law.max, scale = law.scale;
    marked_from_ = window.low;
    if (threadIdx.x == 0) shared_.listed = 0;
    __syncthreads();
    uint64_t all = 0;
    for_own([&](uint32_t local, uint32_t index) {
      uint64_t mass = 0;
      if (stats_[index].max >= window.low) mass = sum_of_masses(collect_tile(local, max, scale, window));
      if (lane_id() == 0) masses_[index] = mass;
      all += mass;
    });
    tell(all);
    cluster_sync();
    Collected found{};
    found.mass = told();
    uint32_t listed = 0;
    if (static_cast<uint32_t>(lane_id()) < size_)
      listed = *of_block(&shared_.listed, static_cast<uint32_t>(lane_id()));
    found.listed = __reduce_add_sync(kAllLanes, listed);
    found.whole = __reduce_max_sync(kAllLanes, listed) <= kOwnList && found.listed <= kHeld * kRowThreads;
    return found;
  }

  // Largest element t of a range such that the elements of the range at t and above measure at least `need`:
  // in number, or in mass. -infinity: all of them do not. Of those listed, by the first block, or of the row.
  __device__ __forceinline__ float reaching(bool of_list, KeyRange range, uint64_t need, const RowLaw& law,
                                            bool in_number) {
    if (!of_list) cluster_sync();  // the bins may still be read
    if (!of_list || rank_ == 0) {
      clear_bins();
      turn_ = 0;
      const float reached = search(of_list, range, need, law, in_number);
      if (!of_list) return reached;
      if (threadIdx.x < size_) *of_block(&shared_.reached, threadIdx.x) = reached;
    }
    cluster_sync();
    return shared_.reached;
  }

  // What the listed elements at `low` or above weigh together.
  __device__ __forceinline__ uint64_t mass_of_list(const RowLaw& law, float low) {
    uint64_t mass = 0;
    for (uint32_t i = threadIdx.x; i < shared_.listed; i += kRowThreads) {
      const float x = value_of(shared_.keys[i]);
      if (x >= low) mass += mass_of(weight_of_logit(x, law.max, law.scale, law.cut));
    }
    tell(sum_of_masses(mass));
    cluster_sync();
    return told();
  }

  // The listed elements that stay, into the masses of this block's tiles.
  __device__ __forceinline__ void add_list_to_tiles(const RowLaw& law) {
    for (uint32_t i = threadIdx.x; i < shared_.listed; i += kRowThreads) {
      const float x = value_of(shared_.keys[i]);
      if (!(x >= law.cut)) continue;
      const uint64_t mass = mass_of(weight_of_logit(x, law.max, law.scale, law.cut));
      atomicAdd(reinterpret_cast<unsigned long long*>(masses_ + shared_.places[i] * size_ + rank_),
                static_cast<unsigned long long>(mass));
    }
    __syncthreads();
  }

  // A number of each warp, to all blocks; behind a barrier of the cluster, the sum of all. In two places in
  // turns: who is late may still read the one before.
  __device__ __forceinline__ void tell(uint64_t of_warp) {
    told_ ^= 1;
    if (static_cast<uint32_t>(lane_id()) < size_) {
      uint64_t* const there = of_block(shared_.partial[told_], static_cast<uint32_t>(lane_id()));
      there[rank_ * kRowWarps + warp_] = of_warp;
    }
  }
  __device__ __forceinline__ uint64_t told() const {
    uint64_t sum = 0;
    for (uint32_t i = lane_id(); i < size_ * kRowWarps; i += kWarpSize) sum += shared_.partial[told_][i];
    return sum_of_masses(sum);
  }

  // This lane's elements in a collected window or above; where the largest ones were, which are done with.
  __device__ __forceinline__ uint32_t& marks_of(uint32_t local) const {
    return reinterpret_cast<uint32_t*>(lane_highs_)[local * kWarpSize + lane_id()];
  }

  float marked_from_ = infinity();

  __device__ __forceinline__ void clear_bins() {
    uint32_t* const bins = &shared_.bins[0][0][0];
    for (int i = threadIdx.x; i < 2 * kParts * kResidentBins; i += kRowThreads) bins[i] = 0;
    __syncthreads();
  }

 private:
  static constexpr int kFew = 10;  // of a lane, that are looked at one by one
  static constexpr int kHeld = 4;  // of a thread, of all that is listed

  __device__ __forceinline__ float search(bool of_list, KeyRange range, uint64_t need, const RowLaw& law,
                                          bool in_number) {
    const RowLaw weighed = law;
    uint32_t keys[kHeld];
    const uint32_t listed = of_list ? take_lists(keys) : 0;
    while (true) {
      const uint32_t span = range.top - range.bottom;
      const int shift = span < kResidentBins ? 0 : 23 - __clz(static_cast<int>(span));
      if (of_list) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          if (i * kRowThreads + warp_ * kWarpSize >= listed) continue;
          const bool there = i * kRowThreads + threadIdx.x < listed;
          count(there, value_of(keys[i]), range, shift, weighed, in_number);
        }
        __syncthreads();
      } else {
        count_row(range, shift, weighed, in_number);
        cluster_sync();
      }
      uint64_t before = 0;
      const int bin = bin_reaching(of_list, need, in_number, before);
      if (bin < 0) return -infinity();
      need -= before;
      range.narrow(shift, static_cast<uint32_t>(bin));
      if (shift == 0) return value_of(range.top);
    }
  }

  // What all blocks have listed, dealt out to the threads of this one; how many there are.
  __device__ __forceinline__ uint32_t take_lists(uint32_t (&keys)[kHeld]) const {
    uint32_t listed = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) keys[i] = key_of(-infinity());
#pragma unroll 1
    for (uint32_t rank = 0; rank < size_; ++rank) {
      const uint32_t of_rank = *of_block(&shared_.listed, rank);
      const uint32_t* const from = of_block(shared_.keys, rank);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const uint32_t at = i * kRowThreads + threadIdx.x - listed;  // far beyond for those before
        if (at < of_rank) keys[i] = from[at];
      }
      listed += of_rank;
    }
    return listed;
  }

  // By a warp: the masses that this lane has found.
  __device__ __forceinline__ uint64_t collect_tile(uint32_t local, float max, float scale,
                                                   const Window& window) {
    const float low = window.low, high = window.high;
    const uint32_t marks = mark(local, [&](float x) { return x >= low; });
    marks_of(local) = marks;
    const unsigned most = __reduce_max_sync(kAllLanes, static_cast<unsigned>(__popc(marks)));
    uint32_t near = 0;
    LaneMass mass;
    if (most <= kFew) {
      for_marked(local, marks, [&](bool there, float x, uint32_t bit) {
        const float weight = exp2_scaled(x - max, scale);
        mass.add(there && x >= high ? weight : 0.0f);
        near |= x < high ? bit : 0;
      });
    } else {
#pragma unroll 1
      for (int quarter = 0; quarter < 4; ++quarter) {
        const Eight eight = quarter_of(local, quarter);
        uint32_t above = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const bool there = eight.x[j] >= high;
          const float weight = exp2_scaled(eight.x[j] - max, scale);
          mass.add(there ? weight : 0.0f);
          if (there) above |= 1u << (4 * j);
        }
        near |= above << quarter;
      }
      near = marks & ~near;
    }
    list(local, near);
    return mass.total();
  }

  // By a warp: the marked elements of each lane.
  __device__ __forceinline__ void list(uint32_t local, uint32_t marks) {
    if (marks != 0) {
      uint32_t place = atomicAdd(&shared_.listed, static_cast<uint32_t>(__popc(marks)));
#pragma unroll 1
      for (; marks != 0 && place < kOwnList; marks &= marks - 1) {
        shared_.keys[place] = key_of(first_marked(local, marks));
        shared_.places[place] = static_cast<uint16_t>(local);
        ++place;
      }
    }
    __syncwarp();
  }

  // By a warp, an element for each lane that has one. Where all fall into one bin they are added up first.
  __device__ __forceinline__ void count(bool there, float x, const KeyRange& range, int shift,
                                        const RowLaw& law, bool in_number) {
    const uint32_t key = key_of(x);
    there = there && range.holds(key);
    const unsigned all = __ballot_sync(kAllLanes, there);
    if (all == 0) return;
    const uint32_t bin = there ? (range.top - key) >> shift : 0;
    uint64_t amount = 0;
    if (there) amount = in_number ? 1 : mass_of(weight_of_logit(x, law.max, law.scale, law.cut));
    const uint32_t common = __shfl_sync(kAllLanes, bin, __ffs(static_cast<int>(all)) - 1);
    if (__all_sync(kAllLanes, !there || bin == common)) {
      amount = sum_of_masses(amount);
      if (lane_id() == 0) add(common, amount);
    } else if (there) {
      add(bin, amount);
    }
  }

  // What is left of the amount in the last part may be the sum of a warp's: 2^16 of them fit there.
  __device__ __forceinline__ void add(uint32_t bin, uint64_t amount) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint64_t rest = amount >> (kPartBits * part);
      const uint32_t piece = static_cast<uint32_t>(part + 1 < kParts ? rest & ((1u << kPartBits) - 1) : rest);
      if (piece != 0) atomicAdd(&shared_.bins[turn_][part][bin], piece);
    }
  }

  __device__ __forceinline__ void count_row(const KeyRange& range, int shift, const RowLaw& law,
                                            bool in_number) {
    const float low = value_of(range.bottom), high = value_of(range.top);
    for_own([&](uint32_t local, uint32_t index) {
      if (!(stats_[index].max >= low)) return;
      const uint32_t marks = mark(local, [&](float x) { return x >= low && x <= high; });
      for_marked(local, marks,
                 [&](bool there, float x, uint32_t) { count(there, x, range, shift, law, in_number); });
    });
  }

  // First bin at which the running sum reaches `need`, and the sum before it; -1 if none does. Of this
  // block's bins, or behind a barrier of the cluster of all blocks'. The other bins, which all have read
  // before that, are empty then.
  __device__ __forceinline__ int bin_reaching(bool alone, uint64_t need, bool in_number, uint64_t& before) {
    const uint32_t bin = threadIdx.x;
    uint64_t own = 0;
    if (bin < kResidentBins) {
#pragma unroll 1
      for (uint32_t rank = alone ? rank_ : 0; rank < (alone ? rank_ + 1 : size_); ++rank) {
        const uint32_t* const bins = of_block(&shared_.bins[turn_][0][0], rank) + bin;
        own += bins[0];
        if (in_number) continue;
#pragma unroll
        for (int part = 1; part < kParts; ++part) {
          own += static_cast<uint64_t>(bins[part * kResidentBins]) << (kPartBits * part);
        }
      }
    }
    turn_ ^= 1;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (bin < kResidentBins) shared_.bins[turn_][part][bin] = 0;
    }
    const uint64_t up_to_lane = sum_up_to_lane(own);
    if (lane_id() == kWarpSize - 1) shared_.warp_words[warp_] = up_to_lane;
    __syncthreads();
    const uint32_t lane = static_cast<uint32_t>(lane_id());
    const uint64_t word = lane < kRowWarps ? shared_.warp_words[lane] : 0;
    const uint64_t up_to = sum_of_masses(lane < warp_ ? word : 0) + up_to_lane;
    if (sum_of_masses(word) < need) return -1;
    if (up_to - own < need && need <= up_to) {
      shared_.found[0] = bin;
      shared_.found[1] = up_to - own;
    }
    __syncthreads();
    before = shared_.found[1];
    return static_cast<int>(shared_.found[0]);
  }

  int turn_ = 0, told_ = 0;  // bins that are filled next; where was told last
};

}  // namespace foretoken::cuda

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
  using Row::element_of_lane;
  using Row::first_marked;
  using Row::for_marked;
  using Row::for_own;
  using Row::lane_highs_;
  using Row::last_bit;
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

  // Before each row, behind what the one before has left.
  __device__ __forceinline__ void begin_search() {
    pulled_ = false;
    marked_from_ = infinity();
  }

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
    if (pulled_) cluster_sync();  // the lists may still be read
    pulled_ = false;
    if (threadIdx.x == 0) shared_.listed = 0;
    __syncthreads();
    uint64_t all = 0;  // of this lane
    for_own([&](uint32_t local, uint32_t index) {
      uint64_t mass = 0;
      if (stats_[index].max >= window.low) mass = collect_tile(local, max, scale, window);
      all += mass;
      if (!args_.samples) return;
      mass = sum_of_masses(mass);
      if (lane_id() == 0) masses_[index] = mass;
    });
    tell(sum_of_masses(all));
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
  // in number, or in mass. -infinity: all of them do not. Of the row, or of those listed, where each block
  // looks for itself.
  __device__ __forceinline__ float reaching(bool of_list, const KeyRange& range, uint64_t need,
                                            const RowLaw& law, bool in_number) {
    if (of_list) return search_list(range, need, law, in_number);
    cluster_sync();  // the bins may still be read
    clear_bins();
    turn_ = 0;
    return search_row(range, need, law, in_number);
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
  static constexpr int kHeld = 4;  // of a thread, of all that is listed

  // Behind a barrier of the cluster.
  __device__ __forceinline__ float search_list(KeyRange range, uint64_t need, const RowLaw& law,
                                               bool in_number) {
    const auto amount_of = [&](uint32_t key) -> uint64_t {
      return in_number ? 1 : mass_of(weight_of_logit(value_of(key), law.max, law.scale, law.cut));
    };
    const uint32_t lane = static_cast<uint32_t>(lane_id());
    const uint32_t of_rank = lane < size_ ? *of_block(&shared_.listed, lane) : 0;  // of the lane's number
    const uint32_t listed = __reduce_add_sync(kAllLanes, of_rank);
    pulled_ = true;
    if (listed <= kWarpSize) {
      const uint32_t key = listed_key(of_rank, lane);
      return among_few(range.holds(key), key, need, amount_of);
    }
    uint32_t keys[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      keys[i] = kNoKey;
      if (i * kRowThreads + warp_ * kWarpSize < listed)
        keys[i] = listed_key(of_rank, i * kRowThreads + threadIdx.x);
    }
    uint32_t* const bins = &shared_.bins[0][0][0];  // [kParts, kListBins]
#pragma unroll
    for (int part = 0; part < kParts; ++part) bins[part * kListBins + threadIdx.x] = 0;
    __syncthreads();
    while (true) {
      const int shift = range.shift();
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (i * kRowThreads + warp_ * kWarpSize >= listed || !range.holds(keys[i])) continue;
        add<kListBins>(bins, (range.top - keys[i]) >> shift, amount_of(keys[i]));
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        shared_.found[0] = kNothing;
        shared_.few = 0;
      }
      find_bin(take_bin<kListBins>(bins + threadIdx.x), need);
      const uint64_t bin = shared_.found[0];
      if (bin == kNothing) return -infinity();
      need -= shared_.found[1];
      range.narrow(shift, static_cast<uint32_t>(bin));
      if (shift == 0) return value_of(range.top);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (i * kRowThreads + warp_ * kWarpSize >= listed || !range.holds(keys[i])) continue;
        const uint32_t place = atomicAdd(&shared_.few, 1u);
        if (place < kWarpSize) shared_.few_keys[place] = keys[i];
      }
      __syncthreads();
      const uint32_t few = shared_.few;
      if (shift <= kGrain) return value_of(shared_.few_keys[0]);  // all of a bin are the same
      if (few > kWarpSize) continue;
      return among_few(lane < few, lane < few ? shared_.few_keys[lane] : kNoKey, need, amount_of);
    }
  }

  // The same of at most one element of each lane, all warps knowing the same ones and looking at one each.
  template <class AmountOf>
  __device__ __forceinline__ float among_few(bool there, uint32_t key, uint64_t need,
                                             const AmountOf& amount_of) {
    const uint32_t of_warp = __shfl_sync(kAllLanes, there ? key : 0, static_cast<int>(warp_));
    const uint64_t from_there = sum_of_masses(there && key >= of_warp ? amount_of(key) : 0);
    if (lane_id() == 0 && of_warp != 0 && from_there >= need) atomicMax(&shared_.reached[reached_], of_warp);
    __syncthreads();
    const uint32_t reached = shared_.reached[reached_];
    reached_ ^= 1;
    if (threadIdx.x == 0) shared_.reached[reached_] = 0;
    return reached != 0 ? value_of(reached) : -infinity();
  }

  __device__ __forceinline__ float search_row(KeyRange range, uint64_t need, const RowLaw& law,
                                              bool in_number) {
    while (true) {
      const uint32_t span = range.top - range.bottom;
      const int shift = span < kResidentBins ? 0 : 23 - __clz(static_cast<int>(span));
      count_row(range, shift, law, in_number);
      cluster_sync();
      if (threadIdx.x == 0) shared_.found[0] = kNothing;
      find_bin(take_bins_of_all(in_number), need);
      const uint64_t bin = shared_.found[0];
      if (bin == kNothing) return -infinity();
      need -= shared_.found[1];
      range.narrow(shift, static_cast<uint32_t>(bin));
      if (shift == 0) return value_of(range.top);
    }
  }

  // An element among all that blocks have listed, `of_rank` being how many the block of the lane's number
  // has. By a warp; beyond the last there is one that is in no range.
  __device__ __forceinline__ uint32_t listed_key(uint32_t of_rank, uint32_t at) const {
    uint32_t owner = size_, place = 0;
#pragma unroll 1
    for (uint32_t rank = 0; rank < size_; ++rank) {
      const uint32_t count = __shfl_sync(kAllLanes, of_rank, static_cast<int>(rank));
      if (at < count && owner == size_) {
        owner = rank;
        place = at;
      }
      at -= count;  // beyond all once it was found
    }
    return owner < size_ ? of_block(shared_.keys, owner)[place] : kNoKey;
  }

  // By a warp: the masses that this lane has found.
  __device__ __forceinline__ uint64_t collect_tile(uint32_t local, float max, float scale,
                                                   const Window& window) {
    const float low = window.low, high = window.high;
    const uint32_t marks = mark(local, [&](float x) { return x >= low; });
    marks_of(local) = marks;
    const uint32_t own = static_cast<uint32_t>(__popc(marks)), up_to = sum_up_to_lane(own);
    const uint32_t all = __shfl_sync(kAllLanes, up_to, kWarpSize - 1);
    LaneMass mass;
    if (all <= kColumn) {
      float* const column = shared_.columns[warp_];
#pragma unroll 1
      for (uint32_t left = marks, at = up_to - own; left != 0; ++at) {
        const int bit = last_bit(left);
        column[at] = element_of_lane(local, bit % 4, bit / 4);
        left ^= 1u << bit;
      }
      __syncwarp();
#pragma unroll 1
      for (uint32_t first = 0; first < all; first += kWarpSize) {
        const uint32_t at = first + static_cast<uint32_t>(lane_id());
        const float x = column[at < all ? at : 0];
        const float weight = exp2_scaled(x - max, scale);
        mass.add(at < all && x >= high ? weight : 0.0f);
        list(local, at < all && x < high, x);
      }
      __syncwarp();
      return mass.total();
    }
    uint32_t near = 0;
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
    list(local, marks & ~near);
    return mass.total();
  }

  // By a warp: an element of each lane that has one.
  __device__ __forceinline__ void list(uint32_t local, bool there, float x) {
    const unsigned all = __ballot_sync(kAllLanes, there);
    if (all == 0) return;
    uint32_t place = 0;
    if (lane_id() == 0) place = atomicAdd(&shared_.listed, static_cast<uint32_t>(__popc(all)));
    place = __shfl_sync(kAllLanes, place, 0) + static_cast<uint32_t>(__popc(all & ((1u << lane_id()) - 1)));
    if (!there || place >= kOwnList) return;
    shared_.keys[place] = key_of(x);
    shared_.places[place] = static_cast<uint16_t>(local);
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
    uint32_t* const bins = &shared_.bins[turn_][0][0];
    if (__all_sync(kAllLanes, !there || bin == common)) {
      amount = sum_of_masses(amount);
      if (lane_id() == 0) add<kResidentBins>(bins, common, amount);
    } else if (there) {
      add<kResidentBins>(bins, bin, amount);
    }
  }

  // What is left of the amount in the last part may be the sum of a warp's: 2^16 of them fit there.
  template <int kCount>
  __device__ __forceinline__ void add(uint32_t* bins, uint32_t bin, uint64_t amount) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint64_t rest = amount >> (kPartBits * part);
      const uint32_t piece = static_cast<uint32_t>(part + 1 < kParts ? rest & ((1u << kPartBits) - 1) : rest);
      if (piece != 0) atomicAdd(bins + part * kCount + bin, piece);
    }
  }

  // This thread's bin, which is empty then.
  template <int kCount>
  __device__ __forceinline__ uint64_t take_bin(uint32_t* bin) {
    uint64_t own = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      own += static_cast<uint64_t>(bin[part * kCount]) << (kPartBits * part);
      bin[part * kCount] = 0;
    }
    return own;
  }

  // The same of all blocks together, behind a barrier of the cluster. The bins that are filled next, which
  // all have read before that, are empty then.
  __device__ __forceinline__ uint64_t take_bins_of_all(bool in_number) {
    const uint32_t bin = threadIdx.x;
    uint64_t own = 0;
    if (bin < kResidentBins) {
#pragma unroll 1
      for (uint32_t rank = 0; rank < size_; ++rank) {
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
    return own;
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

  // From what each thread's bin has: the first at which the running sum reaches `need`, and the sum before
  // it, into `found`; which is left as it is if none does.
  __device__ __forceinline__ void find_bin(uint64_t own, uint64_t need) {
    const uint64_t up_to_lane = sum_up_to_lane(own);
    if (lane_id() == kWarpSize - 1) shared_.warp_words[warp_] = up_to_lane;
    __syncthreads();
    const uint32_t lane = static_cast<uint32_t>(lane_id());
    const uint64_t up_to = sum_of_masses(lane < warp_ ? shared_.warp_words[lane] : 0) + up_to_lane;
    if (up_to - own < need && need <= up_to) {
      shared_.found[0] = threadIdx.x;
      shared_.found[1] = up_to - own;
    }
    __syncthreads();
  }

  static constexpr uint64_t kNothing = ~uint64_t{0};
  static constexpr uint32_t kNoKey = 0x007FFFFF;  // of the least there is
  // Two elements are the same if their keys differ by less than a power of two.
  static constexpr int kGrain = kType == DType::float32 ? 0 : kType == DType::bfloat16 ? 16 : 13;

  int reached_ = 0;          // which of the two
  bool pulled_ = false;      // whether others may still read this block's list
  int turn_ = 0, told_ = 0;  // bins that are filled next; where was told last
};

}  // namespace foretoken::cuda

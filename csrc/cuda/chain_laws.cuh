// Laws of the rows of a chain or a tree. Those of filtered rows take longest: each block of a cluster looks
// for the threshold of a row of its own, as far as that takes few elements, and what has to be read for any
// of them is read by all.
#pragma once

#include "cuda/chain_rows.cuh"
#include "cuda/cluster_filter.cuh"

namespace foretoken::cuda {

// A block alone has nobody to share its windows with.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kSharesWindows = false;
#else
constexpr bool kSharesWindows = true;
#endif

template <DType kType, bool kTree, bool kDrawn = false>
class ChainLaws : protected ChainRows<kType, kTree, kDrawn> {
 protected:
  using Rows = ChainRows<kType, kTree, kDrawn>;
  using Rows::args_;
  using Rows::b_;
  using Rows::dense_;
  using Rows::draft_row;
  using Rows::drafts_;
  using Rows::element;
  using Rows::is_wanted;
  using Rows::of_target;
  using Rows::part_;
  using Rows::rank_;
  using Rows::row_data;
  using Rows::shared_;
  using Rows::size_;
  using Rows::stats;
  using Rows::task_of;
  using Rows::tiles_;
  using Rows::vocab_;
  using Rows::warp_;
  using typename Rows::RowTiles;
  static constexpr int kLoads = RawTile<kType>::kLoads;

  __device__ __forceinline__ ChainLaws(const ChainArgs& args, ChainShared& shared) : Rows(args, shared) {}

  __device__ __forceinline__ uint32_t rows() const {
    return this->reads_laws() ? this->end_of_drafts() : static_cast<uint32_t>(drafts_) + 1;
  }

  __device__ __forceinline__ bool any_filter() const {
    return this->is_filtered(0) || (this->reads_laws() && this->is_filtered(1));
  }

  // Whether laws of rows without filters are dealt out to the blocks. A block that has a warp for each row
  // makes them all for itself, and waits for nobody.
  __device__ __forceinline__ bool tells_laws() const { return kDrawn || rows() > kWarps; }

  // Without filters.
  __device__ __forceinline__ void make_laws() {
    const bool tells = tells_laws();
    const uint32_t first = tells ? warp_ * size_ + rank_ : warp_, step = tells ? size_ * kWarps : kWarps;
#pragma unroll 1
    for (uint32_t row = first; row < rows(); row += step) {
      if (!is_wanted(row)) continue;
      const RowLaw law = this->law_of(row);
      if (tells) {
        this->publish(row, law, this->node_of(row));
      } else if (lane_id() == 0) {
        shared_.records[row] = this->record_of(row, law, this->node_of(row));
      }
    }
  }

  // With filters, before the clusters of a request have met: each reads some rows and makes their laws, a few
  // at a time, while they are in the caches. Inlined: other functions have a third of the registers.
  __device__ __forceinline__ void make_own_laws() {
    const uint32_t clusters = static_cast<uint32_t>(args_.clusters), all = rows();
    take_turns<true>(part_ * all / clusters, (part_ + 1) * all / clusters);
  }

  // The rows in question have been read, and all of the cluster know it. Static: an object whose address is
  // passed on lives in memory.
  static __device__ __noinline__ void make_filtered_laws(const ChainArgs& args, ChainShared& shared,
                                                         uint32_t first, uint32_t end, int32_t drafts) {
    ChainLaws laws(args, shared);
    laws.drafts_ = drafts;
    laws.template take_turns<false>(first, end);
  }

  // What the clusters have found; every block takes it for itself.
  __device__ __forceinline__ void take_laws() {
    constexpr uint32_t kWords = sizeof(ChainRecord) / sizeof(uint4);
    static_assert(sizeof(ChainRecord) % sizeof(uint4) == 0);
    const uint4* const found = reinterpret_cast<const uint4*>(args_.laws + b_ * (2 * args_.most_drafts + 3));
    for (uint32_t i = threadIdx.x; i < rows() * kWords; i += kThreads) {
      if (is_wanted(i / kWords)) reinterpret_cast<uint4*>(shared_.records)[i] = __ldcg(found + i);
    }
  }

 private:
  // By all warps, but at first by all but the one that looks ahead.
  __device__ __forceinline__ void read_rows(uint32_t first, uint32_t count, bool scouts_are_away) {
    const uint32_t away = scouts_are_away ? 1 : 0, worker = warp_ * size_ + rank_;
    if (worker < away) return;
    RowTiles tiles(worker - away, size_ * kWarps - away, first, first + 1, count, tiles_);
#pragma unroll 1
    for (; tiles.any(); tiles.move_on()) {
      if (!is_wanted(tiles.row())) continue;
      RawTile<kType> raw;
      this->load(tiles.row(), tiles.index(), raw);
      this->leave_stats(tiles.row(), tiles.index(), raw);
    }
  }

  __device__ __forceinline__ const Filters& filters_of(uint32_t row) const {
    return shared_.filters[of_target(row) ? 0 : 1];
  }

  // The law of a row, and what it says of the drafted token, to all that go on. By one warp.
  __device__ __forceinline__ void hand_over(uint32_t row, const RowLaw& law) {
    const ChainRecord record = this->publish(row, law, this->node_of(row));
    if (kTree || args_.clusters == 1 || lane_id() != 0) return;
    args_.laws[b_ * (2 * args_.most_drafts + 3) + row] = record;
  }

  // Every block takes a row at a time.
  template <bool kReads>
  __device__ __forceinline__ void take_turns(uint32_t first, uint32_t end) {
    bool begins = true;
#pragma unroll 1
    for (int turn = 0; first < end; first += size_, turn ^= 1) {
      if constexpr (kReads) {
        read_rows(first, end - first < size_ ? end - first : size_, begins);
        begins = false;
        cluster_sync();
      }
      start(args_, shared_, drafts_, dense_, first + rank_, end, turn);
      cluster_sync();
      look_around(turn);
      if constexpr (kSharesWindows) share_windows(turn);
#pragma unroll 1
      for (unsigned rows = those(Threshold::anywhere); rows != 0; rows &= rows - 1) {
        solve_together(static_cast<uint32_t>(__ffs(static_cast<int>(rows)) - 1));
      }
    }
  }

  // What lies in the windows of any of the rows is looked for by all blocks.
  __device__ __forceinline__ void share_windows(int turn) {
    const unsigned rows = those(Threshold::in_window);
    if (rows == 0) return;
    look_through(rows, turn);
    cluster_sync();
    settle(turn);
    cluster_sync();
    look_around(turn);
    count_anew(those(Threshold::known));
    cluster_sync();
    finish(turn);
  }

  static __device__ __noinline__ void start(const ChainArgs& args, ChainShared& shared, int32_t drafts,
                                            bool dense, uint32_t row, uint32_t end, int turn) {
    ChainLaws laws(args, shared);
    laws.drafts_ = drafts;
    laws.dense_ = dense;
    laws.start(row, end, turn);
  }
  __device__ __forceinline__ void start(uint32_t row, uint32_t end, int turn) {
    RowLaw law;
    WindowFilter::Window window;
    Threshold threshold = Threshold::settled;
    if (row < end && is_wanted(row)) {
      law = this->law_of(row);
      if (law.usable && law.kind == LawKind::logits && filters_of(row).any(vocab_))
        threshold = begin_search(task_of(row), shared_.filter, filters_of(row), law, window,
                                 kSharesWindows && args_.aligned);
      if (threshold == Threshold::settled && warp_ == 0) hand_over(row, law);
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    shared_.turns[turn] = {law, window, row, threshold, {0, 0, 0}};
    shared_.filter.listed = 0;
  }

  // Whether few elements will hardly have the mass that is wanted: the largest of each tile have far less.
  static __device__ __forceinline__ bool is_flat(const RowTask& task, const Filters& filters,
                                                 const RowLaw& law) {
    constexpr double kBesideLargest = 1.5;
    uint64_t largest = 0;
    for_stats(task.stats, tiles_of(task.row.size), [&](const TileStats& tile) {
      if (tile.max >= law.cut) largest += mass_of(weight_of_logit(tile.max, law.max, law.scale, law.cut));
    });
    return kBesideLargest * static_cast<double>(sum_of_masses(largest)) <
           static_cast<double>(filters.top_p) * static_cast<double>(law.mass);
  }

  // `shares`: the passes over a row can be left to all blocks.
  static __device__ __noinline__ Threshold begin_search(const RowTask& task, FilterScratch& scratch,
                                                        const Filters& filters, RowLaw& law,
                                                        WindowFilter::Window& window, bool shares) {
    BlockFilter filter(task, scratch);
    const bool takes_window = filter.takes_window(filters);
    const bool flat = takes_window && shares && is_flat(task, filters, law);
    if (flat || !filter.list(filters, law)) {
      if (!takes_window) return Threshold::anywhere;
      WindowFilter search(task, scratch);
      if (shares) {
        window = search.guess(filters, law);
        return window.low < window.high ? Threshold::in_window : Threshold::anywhere;
      }
      if (!search.run(filters, law)) return Threshold::anywhere;
    }
    law.mass = mass_of_row(task.stats, tiles_of(task.row.size), law);
    return Threshold::settled;
  }

  // Behind a barrier of the cluster.
  __device__ __forceinline__ void look_around(int turn) {
    if (threadIdx.x < size_) shared_.seen[threadIdx.x] = *of_block(&shared_.turns[turn], threadIdx.x);
    __syncthreads();
  }

  // Of all blocks' rows, as bits.
  __device__ __forceinline__ unsigned those(Threshold threshold) const {
    const uint32_t lane = static_cast<uint32_t>(lane_id());
    return __ballot_sync(kAllLanes, lane < size_ && shared_.seen[lane].threshold == threshold);
  }

  struct Place {
    uint32_t owner, index;
    const void* row;
  };
  __device__ __forceinline__ Place place_of(unsigned owners, uint32_t item) const {
#pragma unroll 1
    for (uint32_t before = item / tiles_; before > 0; --before) owners &= owners - 1;
    const uint32_t owner = static_cast<uint32_t>(__ffs(static_cast<int>(owners)) - 1);
    return {owner, item % tiles_, row_data(shared_.seen[owner].row)};
  }
  __device__ __forceinline__ void load_quarter(const Place& place, int quarter, uint4* words) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      words[i] = TileOfRow<kType>::load_words(
          place.row, vocab_, place.index * kTile + quarter * 256 + lane_id() * 8 + i * (8 / kLoads), true);
    }
  }

  // For this warp's tiles of the rows of `owners`: begin(place), quarter(number, elements) and end(place).
  // What has been looked at makes room for the next tile, which is on its way meanwhile. Backwards, a pass
  // begins with what the one before it has left in the cache. Of aligned rows.
  template <bool kBackwards, class Begin, class Quarter, class End>
  __device__ __forceinline__ void for_tiles(unsigned owners, const Begin& begin, const Quarter& quarter,
                                            const End& end) const {
    const uint32_t items = static_cast<uint32_t>(__popc(owners)) * tiles_, workers = size_ * kWarps;
    uint32_t item = warp_ * size_ + rank_;
    if (item >= items) return;
    const auto at = [&](uint32_t which) { return place_of(owners, kBackwards ? items - 1 - which : which); };
    Place place = at(item);
    uint4 words[4][kLoads];
#pragma unroll
    for (int q = 0; q < 4; ++q) load_quarter(place, q, words[q]);
#pragma unroll 1
    while (true) {
      item += workers;
      const bool more = item < items;
      const Place next = more ? at(item) : place;
      begin(place);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        Eight eight;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) unpack_words<kType>(words[q][i], eight.x + i * (8 / kLoads));
        if (more) load_quarter(next, q, words[q]);
        quarter(q, eight);
      }
      end(place);
      if (!more) return;
      place = next;
    }
  }

  // Lists what lies in the windows, and adds up what lies above, in the memory of the rows' owners. What
  // counts is few in a tile: it is put into a column for each lane first.
  __device__ __forceinline__ void look_through(unsigned owners, int turn) {
    constexpr int kColumn = kParts * kBins / kThreads;
    uint32_t* const column = shared_.filter.parts + warp_ * kColumn * kWarpSize + lane_id();
    uint32_t* const held = shared_.filter.kept + warp_ * (kMaxTiles / kWarps);  // keys of the window
    static_assert(kMaxTiles / kWarps >= 2 * kWarpSize);
    uint64_t above = 0;  // of this lane
    int num_held = 0;
    uint32_t current = 0;
    int count = 0;
    float low = 0.0f, high = 0.0f;
    const auto let_go = [&] {
      add_above(current, turn, above);
      above = 0;
      list(current, held, num_held);
      num_held = 0;
    };
    const auto add = [&](bool there, float x, LaneMass& mass) {
      const RowLaw& law = shared_.seen[current].law;
      const float weight = weight_of_logit(x, law.max, law.scale, law.cut);
      mass.add(there && x >= high ? weight : 0.0f);
    };
    const auto hold = [&](bool near, float x) {
      const unsigned all = __ballot_sync(kAllLanes, near);
      if (near) held[num_held + __popc(all & ((1u << lane_id()) - 1))] = key_of(x);
      num_held += __popc(all);
      __syncwarp();
      if (num_held < kWarpSize) return;
      num_held -= kWarpSize;
      list(current, held + num_held, kWarpSize);
    };
    for_tiles<true>(
        owners,
        [&](const Place& place) {
          if (place.owner != current) let_go();
          current = place.owner;
          low = shared_.seen[current].window.low;
          high = shared_.seen[current].window.high;
          count = 0;
        },
        [&](int, const Eight& eight) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            if (!(eight.x[j] >= low)) continue;
            if (count < kColumn) column[count * kWarpSize] = __float_as_uint(eight.x[j]);
            ++count;
          }
        },
        [&](const Place& place) {
          const int most = static_cast<int>(__reduce_max_sync(kAllLanes, static_cast<unsigned>(count)));
          LaneMass mass;
          if (most <= kColumn) {
            unsigned near = 0;
#pragma unroll 2
            for (int k = 0; k < most; ++k) {
              const bool there = k < count;
              const float x = there ? __uint_as_float(column[k * kWarpSize]) : low;
              add(there, x, mass);
              near |= there && x < high ? 1u << k : 0u;
            }
#pragma unroll 1
            for (; __any_sync(kAllLanes, near != 0); near &= near - 1) {
              const int k = near != 0 ? __ffs(static_cast<int>(near)) - 1 : 0;
              hold(near != 0, __uint_as_float(column[k * kWarpSize]));
            }
          } else {
#pragma unroll 1
            for (int q = 0; q < 4; ++q) {
              uint4 words[kLoads];
              load_quarter(place, q, words);
              Eight eight;
#pragma unroll
              for (int i = 0; i < kLoads; ++i) unpack_words<kType>(words[i], eight.x + i * (8 / kLoads));
#pragma unroll 1
              for (int j = 0; j < 8; ++j) {
                float x = eight.x[0];
#pragma unroll
                for (int i = 0; i < 7; ++i) eight.x[i] = eight.x[i + 1];
                add(x >= low, x, mass);
                if (__any_sync(kAllLanes, x >= low && x < high)) hold(x >= low && x < high, x);
              }
            }
          }
          above += mass.total();
        });
    let_go();
  }

  // By a warp.
  __device__ __forceinline__ void add_above(uint32_t owner, int turn, uint64_t above) {
    above = sum_of_masses(above);
    if (above == 0 || lane_id() >= 3) return;
    const uint32_t piece =
        static_cast<uint32_t>(above >> (22 * lane_id())) & (lane_id() < 2 ? (1u << 22) - 1 : ~0u);
    atomicAdd(&of_block(&shared_.turns[turn], owner)->above[lane_id()], piece);
  }

  // By a warp: `count` keys, at most one for each lane.
  __device__ __forceinline__ void list(uint32_t owner, const uint32_t* keys, int count) {
    if (count == 0) return;
    FilterScratch* const scratch = of_block(&shared_.filter, owner);
    int place = 0;
    if (lane_id() == 0) place = atomicAdd(&scratch->listed, count);
    place = __shfl_sync(kAllLanes, place, 0) + lane_id();
    if (lane_id() < count && place < WindowFilter::kWindow)
      WindowFilter::list(*scratch)[place] = keys[lane_id()];
    __syncwarp();
  }

  // All of this block's row has been looked through.
  __device__ __forceinline__ void settle(int turn) {
    FilterTurn& own = shared_.turns[turn];
    if (own.threshold != Threshold::in_window) return;
    const RowTask task = task_of(own.row);
    RowLaw law = own.law;
    const bool found = settle(task, shared_.filter, filters_of(own.row), law, own.window, own.mass_above());
    __syncthreads();
    if (threadIdx.x != 0) return;
    own.law.cut = law.cut;
    own.threshold = found ? Threshold::known : Threshold::anywhere;
  }
  static __device__ __noinline__ bool settle(const RowTask& task, FilterScratch& scratch,
                                             const Filters& filters, RowLaw& law,
                                             const WindowFilter::Window& window, uint64_t above) {
    return WindowFilter(task, scratch).settle(filters, law, window, above);
  }

  // The sums of the first pass contain what the filters have removed since.
  __device__ __forceinline__ void count_anew(unsigned owners) {
    float anchor = 0.0f, scale = 0.0f, cut = 0.0f;
    PinnedSum sum;
    for_tiles<false>(
        owners,
        [&](const Place& place) {
          const FilterTurn& seen = shared_.seen[place.owner];
          anchor = this->read(stats(seen.row) + place.index).x;
          scale = seen.law.scale;
          sum = PinnedSum();
          cut = fmaxf(seen.law.cut, shared_.reading[of_target(seen.row) ? 0 : 1].floor_below(anchor));
        },
        [&](int q, const Eight& eight) {
          Eight weights;
#pragma unroll
          for (int j = 0; j < 8; ++j) weights.x[j] = weight_of_logit(eight.x[j], anchor, scale, cut);
          sum.add(q, weights);
        },
        [&](const Place& place) {
          const float total = sum.total();
          const FilterTurn& seen = shared_.seen[place.owner];
          if (lane_id() == 0 && anchor >= seen.law.cut) stats(seen.row)[place.index].sum = total;
        });
  }

  // The tiles have been counted.
  __device__ __forceinline__ void finish(int turn) {
    const FilterTurn& own = shared_.turns[turn];
    if (warp_ != 0 || own.threshold != Threshold::known) return;
    RowLaw law = own.law;
    law.mass = mass_of_row(stats(own.row), tiles_, law);
    hand_over(own.row, law);
  }

  // By histograms over the row.
  __device__ __forceinline__ void solve_together(uint32_t owner) {
    const uint32_t row = shared_.seen[owner].row;
    const RowTask task = task_of(row);
    RowLaw law = shared_.seen[owner].law;
    ClusterFilter(task, shared_.filter).run(filters_of(row), law);
    if (rank_ != owner || warp_ != 0) return;
    law.mass = mass_of_row(task.stats, tiles_, law);
    hand_over(row, law);
  }
};

}  // namespace foretoken::cuda

// Laws of the rows of a chain or a tree. Those of filtered rows take longest: each block of a cluster looks
// for the threshold of a row of its own, as far as that takes few elements, and what has to be read for any
// of them is read by all.
#pragma once

#include "cuda/chain_rows.cuh"
#include "cuda/cluster_filter.cuh"

namespace foretoken::cuda {

template <DType kType, bool kTree>
class ChainLaws : protected ChainRows<kType, kTree> {
 protected:
  using Rows = ChainRows<kType, kTree>;
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

  __device__ __forceinline__ ChainLaws(const ChainArgs& args, ChainShared& shared) : Rows(args, shared) {}

  __device__ __forceinline__ uint32_t rows() const {
    return dense_ ? draft_row(drafts_) : static_cast<uint32_t>(drafts_) + 1;
  }

  __device__ __forceinline__ bool any_filter() const {
    return this->is_filtered(0) || (dense_ && this->is_filtered(1));
  }

  // Without filters: the rows are dealt out to the warps of all blocks.
  __device__ __forceinline__ void make_laws() {
#pragma unroll 1
    for (uint32_t row = warp_ * size_ + rank_; row < rows(); row += size_ * kWarps) {
      if (is_wanted(row)) this->publish(row, this->law_of(row), this->node_of(row));
    }
  }

  // With filters, before the clusters of a request have met: each makes the laws of some rows, which it reads
  // for itself where it shares the request with others. Static: an object whose address is passed on lives in
  // memory.
  static __device__ __noinline__ void make_own_laws(const ChainArgs& args, ChainShared& shared,
                                                    int32_t drafts, bool dense) {
    ChainLaws laws(args, shared);
    laws.drafts_ = drafts;
    laws.dense_ = dense;
    const uint32_t clusters = static_cast<uint32_t>(args.clusters), all = laws.rows();
    const uint32_t first = laws.part_ * all / clusters, end = (laws.part_ + 1) * all / clusters;
    if (clusters > 1) laws.read_own(first, end);
    cluster_sync();
    laws.take_turns(first, end);
  }

  // The rows in question have been read, and all of the cluster know it.
  static __device__ __noinline__ void make_filtered_laws(const ChainArgs& args, ChainShared& shared,
                                                         uint32_t first, uint32_t end, int32_t drafts) {
    ChainLaws laws(args, shared);
    laws.drafts_ = drafts;
    laws.take_turns(first, end);
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
  // By all warps but the one that looks ahead meanwhile.
  __device__ __forceinline__ void read_own(uint32_t first, uint32_t end) {
    if (rank_ == 0 && warp_ == 0) return;
    RowTiles tiles(warp_ * size_ + rank_ - 1, size_ * kWarps - 1, first, first + 1, end - first, tiles_);
    RawTile<kType> raw;
    if (tiles.any()) this->load(tiles, raw);
    this->stream(raw, tiles);
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
  __device__ __forceinline__ void take_turns(uint32_t first, uint32_t end) {
#pragma unroll 1
    for (int turn = 0; first < end; first += size_, turn ^= 1) {
      start(first + rank_, end, turn);
      cluster_sync();
      look_around(turn);
      if (const unsigned rows = those(Threshold::in_window)) {
        look_through(rows, turn);
        cluster_sync();
        settle(turn);
        cluster_sync();
        look_around(turn);
        count_anew(those(Threshold::known));
        cluster_sync();
        finish(turn);
      }
#pragma unroll 1
      for (unsigned rows = those(Threshold::anywhere); rows != 0; rows &= rows - 1) {
        solve_together(static_cast<uint32_t>(__ffs(static_cast<int>(rows)) - 1));
      }
    }
  }

  __device__ __forceinline__ void start(uint32_t row, uint32_t end, int turn) {
    RowLaw law;
    WindowFilter::Window window;
    Threshold threshold = Threshold::settled;
    if (row < end && is_wanted(row)) {
      const RowTask task = task_of(row);
      law = law_of_stats(task);
      if (law.usable && law.kind == LawKind::logits && filters_of(row).any(vocab_))
        threshold = begin_search(task, shared_.filter, filters_of(row), law, window);
      if (threshold == Threshold::settled && warp_ == 0) hand_over(row, law);
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    shared_.turns[turn] = {law, window, row, threshold, {0, 0, 0}};
    shared_.filter.listed = 0;
  }

  static __device__ __noinline__ Threshold begin_search(const RowTask& task, FilterScratch& scratch,
                                                        const Filters& filters, RowLaw& law,
                                                        WindowFilter::Window& window) {
    BlockFilter filter(task, scratch);
    if (filter.list(filters, law)) {
      law.mass = mass_of_row(task.stats, tiles_of(task.row.size), law);
      return Threshold::settled;
    }
    if (!filter.takes_window(filters)) return Threshold::anywhere;
    window = WindowFilter(task, scratch).guess(filters, law);
    return window.low < window.high ? Threshold::in_window : Threshold::anywhere;
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

  // body(owner, index, tile, statistics) for this warp's tiles of the rows of `owners`; the next one is on
  // its way meanwhile.
  template <class Body>
  __device__ __forceinline__ void for_tiles(unsigned owners, const Body& body) {
    const uint32_t items = static_cast<uint32_t>(__popc(owners)) * tiles_, workers = size_ * kWarps;
    uint32_t item = warp_ * size_ + rank_;
    if (item >= items) return;
    uint32_t owner = owner_of(owners, item), index = item % tiles_;
    RawTile<kType> raw;
    float2 found = load_tile(owner, index, raw);
#pragma unroll 1
    while (true) {
      item += workers;
      const bool more = item < items;
      const uint32_t next_owner = more ? owner_of(owners, item) : owner, next_index = item % tiles_;
      RawTile<kType> next;
      float2 next_found;
      if (more) next_found = load_tile(next_owner, next_index, next);
      body(owner, index, raw, found);
      if (!more) return;
      raw = next;
      found = next_found;
      owner = next_owner;
      index = next_index;
    }
  }
  __device__ __forceinline__ uint32_t owner_of(unsigned owners, uint32_t item) const {
#pragma unroll 1
    for (uint32_t before = item / tiles_; before > 0; --before) owners &= owners - 1;
    return static_cast<uint32_t>(__ffs(static_cast<int>(owners)) - 1);
  }
  __device__ __forceinline__ float2 load_tile(uint32_t owner, uint32_t index, RawTile<kType>& raw) const {
    const uint32_t row = shared_.seen[owner].row;
    TileOfRow<kType>::load(raw, row_data(row), vocab_, index, args_.aligned);
    return this->read(stats(row) + index);
  }

  // Lists what lies in the windows, and adds up what lies above, in the memory of the rows' owners.
  __device__ __forceinline__ void look_through(unsigned owners, int turn) {
    uint64_t above = 0;  // of this lane
    uint32_t current = 0;
    for_tiles(owners, [&](uint32_t owner, uint32_t index, const RawTile<kType>& raw, const float2&) {
      if (owner != current) {
        add_above(current, turn, above);
        above = 0;
        current = owner;
      }
      const FilterTurn& seen = shared_.seen[owner];
      const uint32_t row = seen.row;
      const float low = seen.window.low, high = seen.window.high;
      uint32_t hits = 0, near = 0;
      {
        LaneTile tile;
        raw.unpack(tile);
#pragma unroll
        for (int i = 0; i < 32; ++i) hits |= tile.x[i] >= low ? 1u << i : 0u;
      }
      if (!__any_sync(kAllLanes, hits != 0)) return;
      LaneMass mass;
#pragma unroll 1
      for (; hits != 0; hits &= hits - 1) {
        const int i = __ffs(static_cast<int>(hits)) - 1;
        const float x = element(row, index * kTile + LaneTile::element_of(i));
        if (x >= high) {
          mass.add(weight_of_logit(x, seen.law.max, seen.law.scale, seen.law.cut));
        } else {
          near |= 1u << i;
        }
      }
      above += mass.total();
      list(owner, row, index, near);
    });
    add_above(current, turn, above);
  }

  // By a warp.
  __device__ __forceinline__ void add_above(uint32_t owner, int turn, uint64_t above) {
    above = sum_of_masses(above);
    if (above == 0 || lane_id() >= 3) return;
    const uint32_t piece =
        static_cast<uint32_t>(above >> (22 * lane_id())) & (lane_id() < 2 ? (1u << 22) - 1 : ~0u);
    atomicAdd(&of_block(&shared_.turns[turn], owner)->above[lane_id()], piece);
  }

  // The elements of a tile that `near` says.
  __device__ __forceinline__ void list(uint32_t owner, uint32_t row, uint32_t index, uint32_t near) {
    const int count = __popc(near), up_to = sum_up_to_lane(count);
    const int of_tile = __shfl_sync(kAllLanes, up_to, kWarpSize - 1);
    if (of_tile == 0) return;
    FilterScratch* const scratch = of_block(&shared_.filter, owner);
    int place = 0;
    if (lane_id() == 0) place = atomicAdd(&scratch->listed, of_tile);
    place = __shfl_sync(kAllLanes, place, 0) + up_to - count;
    uint32_t* const keys = WindowFilter::list(*scratch);
#pragma unroll 1
    for (; near != 0; near &= near - 1, ++place) {
      const int i = __ffs(static_cast<int>(near)) - 1;
      if (place < WindowFilter::kWindow)
        keys[place] = key_of(element(row, index * kTile + LaneTile::element_of(i)));
    }
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
    for_tiles(owners, [&](uint32_t owner, uint32_t index, const RawTile<kType>& raw, const float2& found) {
      const FilterTurn& seen = shared_.seen[owner];
      const float anchor = found.x, scale = seen.law.scale;
      if (anchor < seen.law.cut) return;
      const float cut = fmaxf(seen.law.cut, shared_.reading[of_target(seen.row) ? 0 : 1].floor_below(anchor));
      LaneTile tile;
      raw.unpack(tile);
      const float sum = sum_of_weights(tile, anchor, scale, cut);
      if (lane_id() == 0) stats(seen.row)[index].sum = sum;
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

// Verification of many plain chains at a time. Every warp of every block takes the next tiles that nobody has
// taken yet, of whichever request; the warp that reads the last of a row makes its law, the one that makes
// the last law of a request walks and draws, and where that takes masses of a residual, all warps with
// nothing left to read take its tiles. A warp waits only for others that are at work already, so blocks need
// not all be there at a time.
#pragma once

#include "cuda/queue_settle.cuh"

namespace foretoken::cuda {

template <DType kType>
class ChainQueue {
 public:
  __device__ __forceinline__ ChainQueue(const QueueArgs& args, QueueShared& shared)
      : args_(args),
        chain_(args.chain),
        shared_(shared),
        vocab_(static_cast<uint32_t>(args.chain.vocab)),
        tiles_(static_cast<uint32_t>(tiles_of(args.chain.vocab))),
        row_items_((tiles_ + static_cast<uint32_t>(args.tiles_an_item) - 1) /
                   static_cast<uint32_t>(args.tiles_an_item)) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) shared_.first_item = take_ticket(&args_.counters->next_item, kWarps);
    __syncthreads();
    const uint32_t item = shared_.first_item + threadIdx.x / kWarpSize;
    read(item < num_items() ? tile_of(item) : Tile{});
    work_off_tasks();
    leave();
  }

 private:
  static constexpr int kBytes = RawTile<kType>::kBytes;

  // Of a row of a request, and where the item ends that it belongs to.
  struct Tile {
    bool any = false;
    uint32_t request = 0, row = 0, index = 0, end = 0;
  };

  __device__ __forceinline__ uint32_t target_rows() const {
    return static_cast<uint32_t>(chain_.most_drafts) + 1;
  }
  // Rows whose statistics are given are one item.
  __device__ __forceinline__ uint32_t target_items() const {
    return target_rows() * (chain_.given != nullptr ? 1 : row_items_);
  }
  __device__ __forceinline__ uint32_t request_items() const {
    return target_items() +
           (chain_.draft.data != nullptr ? static_cast<uint32_t>(chain_.most_drafts) : 0) * row_items_;
  }
  __device__ __forceinline__ uint32_t num_items() const {
    return static_cast<uint32_t>(args_.num_requests) * request_items();
  }

  __device__ __forceinline__ Tile tile_of(uint32_t item) const {
    Tile tile;
    tile.any = true;
    tile.request = item / request_items();
    uint32_t rest = item % request_items();
    if (chain_.given != nullptr && rest < target_rows()) {
      tile.row = rest;
      return tile;
    }
    if (chain_.given != nullptr) rest = rest - target_rows() + target_rows() * row_items_;
    tile.row = rest / row_items_;
    tile.index = rest % row_items_ * static_cast<uint32_t>(args_.tiles_an_item);
    tile.end = tile.index + static_cast<uint32_t>(args_.tiles_an_item);
    tile.end = tile.end < tiles_ ? tile.end : tiles_;
    return tile;
  }

  __device__ __forceinline__ bool of_target(uint32_t row) const { return row < target_rows(); }
  __device__ __forceinline__ const ChainHeader& header(uint32_t request) const {
    return shared_.headers()[request].header;
  }
  // False: nothing is to be read.
  __device__ __forceinline__ bool is_wanted(const Tile& tile) const {
    const ChainHeader& known = header(tile.request);
    if (!known.admitted || tile.end == 0) return false;
    return of_target(tile.row)
               ? tile.row <= static_cast<uint32_t>(known.drafts)
               : known.dense && tile.row < target_rows() + static_cast<uint32_t>(known.drafts);
  }

  // Numbers of items, asked for one ahead.
  class Tickets {
   public:
    __device__ __forceinline__ explicit Tickets(QueueCounters* counters) : counters_(counters) { ask(); }
    __device__ __forceinline__ uint32_t next() {
      const uint32_t item = __shfl_sync(kAllLanes, next_, 0);
      ask();
      return item;
    }

   private:
    __device__ __forceinline__ void ask() {
      if (lane_id() == 0) next_ = take_ticket(&counters_->next_item);
    }

    QueueCounters* const counters_;
    uint32_t next_ = 0;
  };

  __device__ __forceinline__ const char* row_of(const Tile& tile) const {
    const bool target = of_target(tile.row);
    const ChainRowsView& view = target ? chain_.target : chain_.draft;
    const int64_t at = static_cast<int64_t>(tile.request) * view.strides[0] +
                       static_cast<int64_t>(target ? tile.row : tile.row - target_rows()) * view.strides[1];
    return static_cast<const char*>(view.data) + at * kBytes;
  }
  __device__ __forceinline__ void load(const Tile& tile, RawTile<kType>& raw) const {
    TileOfRow<kType>::load(raw, row_of(tile), vocab_, tile.index, chain_.aligned);
  }
  // Into the second-level cache, a line each lane.
  __device__ __forceinline__ void prefetch(const Tile& tile) const {
    constexpr uint32_t kElements = 128 / kBytes;
    const uint32_t at = tile.index * kTile + static_cast<uint32_t>(lane_id()) * kElements;
    if (lane_id() * kElements < kTile && at < vocab_)
      fetch_line(row_of(tile) + static_cast<int64_t>(at) * kBytes);
  }

  // A row that has been read as far as this warp was to.
  struct Arrival {
    uint32_t request = 0, row = 0, before = ~0u;  // `before`: known to the first lane, once it is looked at
  };
  __device__ __forceinline__ bool is_last(const Arrival& arrival) const {
    return __shfl_sync(kAllLanes, arrival.before, 0) == row_items_ - 1;
  }

  // Items until there are none. While a tile is on its way to registers no function is called, as that would
  // have it wait in memory: whoever has to call one leaves the inner loop, and asks for the tile once more.
  __device__ __forceinline__ void read(Tile tile) {
    if (tile.any && tile.end != 0) prefetch(tile);  // nobody knows yet whether it is wanted
    read_headers();
    __syncthreads();
    Tickets tickets(args_.counters);
#pragma unroll 1
    while (tile.any) {
      if (!is_wanted(tile)) {
        serve(tile);
        const uint32_t item = tickets.next();
        tile = item < num_items() ? tile_of(item) : Tile{};
        continue;
      }
      RawTile<kType> raw;
      load(tile, raw);
      Arrival earlier, latest;
#pragma unroll 1
      while (true) {
        Tile next = tile;
        const bool ends = ++next.index == tile.end;
        if (ends) {
          const uint32_t item = tickets.next();
          next = item < num_items() ? tile_of(item) : Tile{};
        }
        const bool goes_on = next.any && is_wanted(next);
        RawTile<kType> following;
        if (goes_on) load(next, following);
        leave_stats(tile, raw);
        earlier = latest;
        latest.before = ~0u;
        if (ends) {
          latest = {tile.request, tile.row, ~0u};
          if (lane_id() == 0) {
            fence();
            latest.before = arrive(&args_.requests[tile.request].items_read[tile.row], row_items_);
          }
        }
        tile = next;
        if (!goes_on || is_last(earlier)) break;
        raw = following;
      }
      if (is_last(earlier)) settle(earlier.request, earlier.row);
      if (is_last(latest)) settle(latest.request, latest.row);
    }
  }

  __device__ __forceinline__ void leave_stats(const Tile& tile, RawTile<kType>& raw) const {
    float lane_max;
    const RowReading& reading = shared_.headers()[tile.request].reading[of_target(tile.row) ? 0 : 1];
    const TileStats found = stats_of_tile(raw, reading, lane_max);
    if (lane_id() != 0) return;
    const int64_t rows = 2 * chain_.most_drafts + 3;
    TileStats* const there = chain_.stats + (tile.request * rows + tile.row) * tiles_ + tile.index;
    *reinterpret_cast<float2*>(there) = make_float2(found.max, found.sum);
  }

  // Functions of their own: what is done once for a row does not take registers from the reading of tiles.
  // True: all laws of the request are made.
  static __device__ __noinline__ bool settle_row(const QueueArgs& args, QueueShared& shared, uint32_t request,
                                                 uint32_t row) {
    fence();
    return QueueSettler<kType>(args, shared, request).settle_row(row);
  }
  static __device__ __noinline__ void go_on(const QueueArgs& args, QueueShared& shared, uint32_t request,
                                            int32_t task) {
    fence();
    QueueSettler<kType>(args, shared, request).go_on(task);
  }
  __device__ __forceinline__ void settle(uint32_t request, uint32_t row) {
    if (settle_row(args_, shared_, request, row)) go_on(args_, shared_, request, kNoTask);
  }

  // An item that is not read: a row whose statistics are given, or nothing at all.
  __device__ __forceinline__ void serve(const Tile& tile) {
    const ChainHeader& known = header(tile.request);
    if (!known.admitted) {
      if (tile.row == 0 && tile.index == 0) go_on(args_, shared_, tile.request, kNoTask);
    } else if (tile.end == 0 && tile.row <= static_cast<uint32_t>(known.drafts)) {
      settle(tile.request, tile.row);
    }
  }

  // Tiles of tasks, as they come, until all requests are settled.
  __device__ __forceinline__ void work_off_tasks() {
    const uint32_t num_requests = static_cast<uint32_t>(args_.num_requests);
    while (true) {
      uint32_t ticket = 0;
      if (lane_id() == 0) ticket = take_ticket(&args_.counters->next_chunk);
      ticket = __shfl_sync(kAllLanes, ticket, 0);
      const uint32_t task = ticket / tiles_, index = ticket % tiles_;
      const bool possible = task < num_requests * kMostTasks;
#pragma unroll 1
      while (!possible || look_at(&task_ready(args_, task)) == 0) {
        if (look_at(&args_.counters->num_settled) == num_requests) return;
        pause();
      }
      __syncwarp();
      sum_tile(task, index);
    }
  }

  __device__ __forceinline__ void sum_tile(uint32_t number, uint32_t index) {
    const QueueTask task = args_.tasks[number];
    uint32_t before = 0;
    QueueSettler<kType>(args_, shared_, task.request).sum_tile(task, index);
    if (lane_id() == 0) {
      fence();
      before = arrive(&chunks_done(args_, number), tiles_);
    }
    if (__shfl_sync(kAllLanes, before, 0) == tiles_ - 1)
      go_on(args_, shared_, task.request, static_cast<int32_t>(number));
  }

  __device__ __forceinline__ void read_headers() {
    for (uint32_t b = threadIdx.x; b < static_cast<uint32_t>(args_.num_requests); b += kThreads) {
      QueueHeader& known = shared_.headers()[b];
      known.header = header_of(chain_, b);
      if (!known.header.admitted) continue;
      known.reading[0] = RowReading::of_logits(chain_.sampling.temperature[known.header.slot]);
      known.reading[1] = RowReading::of_logits(chain_.draft_sampling.temperature[known.header.slot]);
    }
  }

  // The last block to go leaves the counters as it found them.
  __device__ __forceinline__ void leave() {
    __syncthreads();
    QueueCounters& counters = *args_.counters;
    if (threadIdx.x == 0) shared_.is_last = add_in_order(&counters.num_left, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!shared_.is_last) return;
    for (uint32_t task = threadIdx.x; task < counters.num_tasks; task += kThreads)
      task_ready(args_, task) = 0;
    __syncthreads();
    if (threadIdx.x == 0) counters = {};
  }

  const QueueArgs& args_;
  const ChainArgs& chain_;
  QueueShared& shared_;
  const uint32_t vocab_, tiles_, row_items_;
};

}  // namespace foretoken::cuda

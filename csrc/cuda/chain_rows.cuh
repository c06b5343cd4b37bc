// The rows of a chain or a tree, as the blocks of the clusters that share it see them: where they lie, how
// they are read, and the laws that come of it.
#pragma once

#include "cuda/drawn_tree.cuh"

namespace foretoken::cuda {

template <DType kType, bool kTree, bool kDrawn = false>
class ChainRows {
 protected:
  __device__ __forceinline__ ChainRows(const ChainArgs& args, ChainShared& shared)
      : args_(args),
        shared_(shared),
        rank_(cluster_rank()),
        size_(cluster_size()),
        warp_(threadIdx.x / kWarpSize) {
    const uint32_t cluster = blockIdx.x / size_, clusters = static_cast<uint32_t>(args.clusters);
    b_ = cluster / clusters;
    part_ = cluster % clusters;
    vocab_ = static_cast<uint32_t>(args.vocab);
    tiles_ = static_cast<uint32_t>(tiles_of(args.vocab));
    if constexpr (kTree) {
      find_rows();
    } else {
      row_scratch_ = of_block(reinterpret_cast<RowScratch*>(&shared + 1), 0);
    }
    stats_ = in_global() ? args.stats + b_ * (2 * args.most_drafts + 3) * tiles_ : row_scratch_->stats;
  }

  __device__ __forceinline__ bool in_global() const { return kTree || args_.stats != nullptr; }

  // The first of the target's rows that belong to the request, and how many there are; none if its offsets
  // leave the tensor.
  __device__ __forceinline__ void find_rows() {
    int64_t first = b_ * (args_.most_drafts + 1), end = first + args_.most_drafts + 1;
    int64_t offset = b_ * args_.target.strides[0];
    if (args_.row_offsets.data != nullptr) {
      first = read_number(args_.row_offsets, b_);
      end = read_number(args_.row_offsets, b_ + 1);
      const bool sound = first >= 0 && end >= first && end <= args_.num_rows;
      offset = sound ? first * args_.target.strides[1] : 0;
      if (!sound) end = first;
    }
    num_rows_ = static_cast<int32_t>(end - first < kMaxNodes ? end - first : kMaxNodes);
    rows_ = static_cast<const char*>(args_.target.data) + offset * RawTile<kType>::kBytes;
  }

  // The tiles that a warp reads, one after the other: of `count` rows, `first` and those that follow
  // `second`.
  class RowTiles {
   public:
    __device__ __forceinline__ RowTiles(uint32_t worker, uint32_t workers, uint32_t first, uint32_t second,
                                        uint32_t count, uint32_t tiles)
        : first_(first), second_(second), count_(count), tiles_(tiles) {
      place_ = worker / tiles;
      index_ = worker % tiles;
      place_step_ = workers / tiles;
      index_step_ = workers % tiles;
    }
    __device__ __forceinline__ bool any() const { return place_ < count_; }
    __device__ __forceinline__ uint32_t row() const { return place_ == 0 ? first_ : second_ + place_ - 1; }
    __device__ __forceinline__ uint32_t index() const { return index_; }
    // True: to another row.
    __device__ __forceinline__ bool move_on() {
      const uint32_t before = place_;
      place_ += place_step_;
      index_ += index_step_;
      if (index_ >= tiles_) {
        index_ -= tiles_;
        ++place_;
      }
      return place_ != before;
    }

   private:
    uint32_t first_, second_, count_, tiles_;
    uint32_t place_, index_, place_step_, index_step_;
  };

  __device__ __forceinline__ void load(uint32_t row, uint32_t index, RawTile<kType>& raw) const {
    TileOfRow<kType>::load(raw, row_data(row), vocab_, index, args_.aligned);
  }
  // Of trees of drawn drafts the tiles are those of rows in a list.
  __device__ __forceinline__ uint32_t row_of(const RowTiles& tiles) const {
    return kDrawn ? drawn_tree().rows[tiles.row()] : tiles.row();
  }

  // Whether laws of the drafts come from their rows.
  __device__ __forceinline__ bool reads_laws() const { return dense_ && args_.draft_records == nullptr; }
  // Number of a draft's row among all.
  __device__ __forceinline__ uint32_t draft_row(int32_t node) const {
    return static_cast<uint32_t>(args_.most_drafts + 1 + node);
  }
  // The same of the law that a node's children were drawn from.
  __device__ __forceinline__ uint32_t law_row(int32_t node) const {
    return draft_row(kDrawn ? drawn_tree().nodes.law_row[node] : node);
  }
  __device__ __forceinline__ DrawnTree& drawn_tree() const {
    return *reinterpret_cast<DrawnTree*>(&shared_ + 1);
  }
  __device__ __forceinline__ uint32_t end_of_drafts() const {
    return draft_row(kDrawn ? args_.law_rows : drafts_);
  }
  __device__ __forceinline__ bool of_target(uint32_t row) const {
    return kTree || row <= static_cast<uint32_t>(args_.most_drafts);
  }
  __device__ __forceinline__ bool is_wanted(uint32_t row) const {
    if constexpr (kDrawn)
      return drawn_tree().wanted[of_target(row) ? row : row - draft_row(0) + kMostTreeNodes];
    return of_target(row) ? row <= static_cast<uint32_t>(drafts_) : reads_laws() && row < draft_row(drafts_);
  }
  __device__ __forceinline__ const void* row_data(uint32_t row) const {
    if constexpr (kTree) return rows_ + row * args_.target.strides[1] * RawTile<kType>::kBytes;
    const bool target = of_target(row);
    const ChainRowsView& view = target ? args_.target : args_.draft;
    const int64_t at = b_ * view.strides[0] + (target ? row : row - draft_row(0)) * view.strides[1];
    return static_cast<const char*>(view.data) + at * RawTile<kType>::kBytes;
  }
  __device__ __forceinline__ float element(uint32_t row, uint32_t token) const {
    return element_at({row_data(row), kType, vocab_}, token);
  }
  // Where other clusters may have written it, past the first-level cache.
  __device__ __forceinline__ float2 read(const TileStats* tile) const {
    const float2* words = reinterpret_cast<const float2*>(tile);
    return in_global() ? __ldcg(words) : *words;
  }
  __device__ __forceinline__ TileStats* stats(uint32_t row) const { return stats_ + row * tiles_; }

  // False: nothing is emitted, with status_. The same in all threads of a request.
  __device__ __forceinline__ bool read_header() {
    const int64_t requested = args_.num_drafts.data ? read_number(args_.num_drafts, b_) : args_.most_drafts;
    const int64_t slot = args_.slots.data ? read_number(args_.slots, b_) : b_;
    if (requested == -1) return false;
    if (slot < 0 || slot >= args_.sampling.size || slot >= args_.draft_sampling.size) {
      status_ = kBadRow;
      return false;
    }
    usable_ = requested >= 0 && requested <= args_.most_drafts;
    if constexpr (kTree) {
      usable_ = usable_ && requested < num_rows_;
      if (num_rows_ < 1) {
        status_ = kBadRow;
        return false;
      }
    }
    drafts_ = usable_ ? static_cast<int32_t>(requested) : 0;
    seed_ = args_.sampling.seed + slot;
    greedy_ = args_.sampling.temperature[slot] == 0.0f;
    dense_ = !kTree && args_.draft.data != nullptr && !greedy_ && drafts_ > 0;
    if (warp_ < 2 && lane_id() == 0) {
      const SamplingView& sampling = warp_ == 0 ? args_.sampling : args_.draft_sampling;
      shared_.filters[warp_] = {sampling.temperature[slot], sampling.top_k[slot], sampling.top_p[slot],
                                sampling.min_p[slot]};
      shared_.reading[warp_] = RowReading::of_logits(shared_.filters[warp_].temperature);
      shared_.part = Part::alone;
    }
    __syncthreads();
    return true;
  }

  __device__ __forceinline__ bool is_filtered(int which) const {
    return shared_.reading[which].kind == LawKind::logits && shared_.filters[which].any(vocab_);
  }

  __device__ __forceinline__ float* lanes(uint32_t row) const {
    if (!is_filtered(of_target(row) ? 0 : 1)) return nullptr;
    if (!in_global()) return tiles_ <= kLaneTiles ? row_scratch_->lanes : nullptr;
    if (args_.lanes == nullptr) return nullptr;
    return args_.lanes + ((b_ * (2 * args_.most_drafts + 3) + row) * tiles_) * kWarpSize;
  }

  __device__ __forceinline__ void leave_stats(uint32_t row, uint32_t index, RawTile<kType>& raw) {
    float lane_max = -infinity();
    const TileStats found = stats_of_tile(raw, shared_.reading[of_target(row) ? 0 : 1], lane_max);
    if (lane_id() == 0) *reinterpret_cast<float2*>(stats(row) + index) = make_float2(found.max, found.sum);
    if (float* out = lanes(row)) out[index * kWarpSize + lane_id()] = lane_max;
  }

  static constexpr uint32_t kTileBytes = kTile * RawTile<kType>::kBytes;

  // What is the same for all tiles of a row.
  struct StreamedRow {
    const char* data;
    const char* of_lane;  // this lane's first elements
    TileStats* stats;
    float* lanes;  // null: not wanted
    const RowReading* reading;
    bool wanted;
  };
  __device__ __forceinline__ StreamedRow streamed(uint32_t row) const {
    constexpr bool kMayFilter = kTree || kDrawn;  // rows of chains with filters do not come this way
    const char* const data = static_cast<const char*>(row_data(row));
    return {data,
            data + lane_id() * 8 * RawTile<kType>::kBytes,
            stats(row),
            kMayFilter ? lanes(row) : nullptr,
            &shared_.reading[of_target(row) ? 0 : 1],
            is_wanted(row)};
  }

  // `raw`: the first of them. Where tiles lie is worked out once a row: beside the sums, of some 400
  // instructions, it would count.
  __device__ __forceinline__ void stream(RawTile<kType>& raw, RowTiles& tiles) {
    if (!tiles.any()) return;
    StreamedRow row = streamed(row_of(tiles));
    const uint32_t whole = args_.aligned ? vocab_ / kTile : 0;  // tiles that can be read 16 bytes at a time
    bool more = true;
#pragma unroll 1
    while (more) {
      const bool wanted = row.wanted;
      TileStats* const out = row.stats + tiles.index();
      float* const of_lanes = row.lanes != nullptr ? row.lanes + tiles.index() * kWarpSize : nullptr;
      float lane_max = -infinity();
      TileSummary<kType> summary;
      if (wanted) summary.begin(raw, *row.reading, lane_max);
      do {
        if (tiles.move_on() && tiles.any()) row = streamed(row_of(tiles));
        more = tiles.any();
      } while (more && !row.wanted);
      if (more && tiles.index() < whole) {
        raw.load_lane(row.of_lane + static_cast<uint64_t>(tiles.index()) * kTileBytes);
      } else if (more) {
        TileOfRow<kType>::load(raw, row.data, vocab_, tiles.index(), args_.aligned);
      }
      if (!wanted) continue;
      const TileStats found = summary.end();
      if (lane_id() == 0) *reinterpret_cast<float2*>(out) = make_float2(found.max, found.sum);
      if (of_lanes != nullptr) of_lanes[lane_id()] = lane_max;
    }
  }

  // Statistics of the target's rows from whoever computed them. By all threads of all clusters.
  __device__ __forceinline__ void take_given() {
    const uint32_t clusters = static_cast<uint32_t>(args_.clusters);
    const TileStats* const from = args_.given + b_ * (args_.most_drafts + 1) * tiles_;
    for (uint32_t i = (part_ * size_ + rank_) * kThreads + threadIdx.x;
         i < static_cast<uint32_t>(drafts_ + 1) * tiles_; i += clusters * size_ * kThreads) {
      const TileStats found = from[i];
      const bool regular = is_regular(found.max, found.sum, greedy_);
      *reinterpret_cast<float2*>(stats(0) + i) = make_float2(found.max, regular ? found.sum : infinity());
    }
  }

  // What can be known of the nodes before any law is, in two steps. By one warp, a lane for each node. The
  // first needs nothing of the header, and two reads, of which one waits for the other.
  __device__ __forceinline__ ChainNode look_at_drafts() const {
    const int32_t node = lane_id();
    ChainNode found{};
    found.token = -1;
    if (node < 1 || node > args_.most_drafts) return found;
    const int64_t token = read_number(args_.draft_tokens, b_, node - 1);
    if (token < 0 || token >= static_cast<int64_t>(vocab_)) return found;
    found.token = static_cast<int32_t>(token);
    found.of_target = element(static_cast<uint32_t>(node - 1), static_cast<uint32_t>(token));
    if (args_.draft.data != nullptr)
      found.of_draft = element(draft_row(node - 1), static_cast<uint32_t>(token));
    return found;
  }

  __device__ __forceinline__ void look_ahead(ChainNode found) {
    const int32_t node = lane_id();
    if (node > drafts_) found.token = -1;
    const uint64_t seed = *seed_, base = static_cast<uint64_t>(read_number(args_.base, b_));
    found.coin = random_coin(seed, base, static_cast<uint32_t>(node));
    found.closing_bits = args_.samples ? random_bits(seed, base, args_.purpose, args_.step)
                                       : random_bits(seed, base, Purpose::close, static_cast<uint32_t>(node));
    shared_.nodes[node] = found;
  }

  // Whether this cluster is the one that goes on: all others of the request have read their share.
  __device__ __forceinline__ bool goes_on() {
    cluster_sync();
    if (args_.clusters == 1) return true;
    if (rank_ == 0 && warp_ == 0) {
      uint32_t before = 0;
      if (lane_id() == 0) before = add_in_order(args_.arrivals + b_, 1u);
      const bool last = __shfl_sync(kAllLanes, before, 0) == static_cast<uint32_t>(args_.clusters) - 1;
      if (last && lane_id() == 0) args_.arrivals[b_] = 0;
      if (static_cast<uint32_t>(lane_id()) < size_)
        of_block(&shared_, static_cast<uint32_t>(lane_id()))->is_last = last ? 1 : 0;
    }
    cluster_sync();
    return shared_.is_last != 0;
  }

  // Whether the blocks that share a request's reading go on together.
  __device__ __forceinline__ bool may_meet() const {
    return args_.clusters > 1 && size_ == 1 && args_.lanes != nullptr;
  }
  __device__ __forceinline__ TogetherSums together() const {
    return {args_.lanes + b_ * (2 * args_.most_drafts + 3) * tiles_ * kWarpSize, tiles_};
  }

  // Of rows without filters. False: this block is through.
  __device__ __forceinline__ bool meets() {
    const uint32_t blocks = static_cast<uint32_t>(args_.clusters);
    uint32_t* const place = args_.arrivals + b_;
    __syncthreads();
    if (threadIdx.x == 0) shared_.part = MeetingWord(place).meet(blocks);
    __syncthreads();
    if (threadIdx.x == kThreads - 1) MeetingWord(place).leave(blocks);
    return shared_.part != Part::leaves;
  }

  // The node whose token was drawn behind a row.
  __device__ __forceinline__ ChainNode node_of(uint32_t row) const {
    const uint32_t node = (of_target(row) ? row : row - draft_row(0)) + 1;
    if (!kTree && !kDrawn && node <= static_cast<uint32_t>(drafts_))
      return *of_block(&shared_.nodes[node], 0);
    ChainNode none{};
    none.token = -1;
    return none;
  }

  // law_of_stats() of cuda/law.cuh for a row without filters, four tiles a lane at a time.
  __device__ __forceinline__ RowLaw law_of(uint32_t row) const {
    const TileStats* const tile = stats(row);
    const RowReading& reading = shared_.reading[of_target(row) ? 0 : 1];
    const auto read_at = [&](uint32_t first, int i) {
      const uint32_t index = first + i * kWarpSize + lane_id();
      return index < tiles_ ? read(tile + index) : make_float2(-infinity(), 0.0f);
    };
    float high = -infinity();
    bool regular = true;
    float2 found[4];
#pragma unroll 1
    for (uint32_t first = 0; first < tiles_; first += 4 * kWarpSize) {
#pragma unroll
      for (int i = 0; i < 4; ++i) found[i] = read_at(first, i);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        high = fmaxf(high, found[i].x);
        regular = regular && found[i].y <= static_cast<float>(kTile + 1) &&
                  (reading.kind == LawKind::point || found[i].x < infinity());
      }
    }
    RowLaw law;
    law.max = max_of_warp(high);
    law.usable = __all_sync(kAllLanes, regular) != 0 && law.max > -infinity();
    if (reading.kind == LawKind::point || !law.usable) {
      law.top = lowest(row, law.max);
      law.max = 0.0f;
      return law;
    }
    law.kind = LawKind::logits;
    law.scale = reading.scale;
    law.cut = reading.floor_below(law.max);
    uint64_t mass = 0;
#pragma unroll 1
    for (uint32_t first = 0; first < tiles_; first += 4 * kWarpSize) {
      if (tiles_ > 4 * kWarpSize) {
#pragma unroll
        for (int i = 0; i < 4; ++i) found[i] = read_at(first, i);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) mass += mass_of_stats({found[i].x, found[i].y}, law);
    }
    law.mass = sum_of_masses(mass);
    return law;
  }

  // Lowest id of the largest element of a row; 0 if the row has none. By one warp.
  __device__ __forceinline__ int64_t lowest(uint32_t row, float high) const {
    if (!(high > -infinity())) return 0;
    uint32_t first = ~0u;
    for (uint32_t index = lane_id(); index < tiles_ && first == ~0u; index += kWarpSize) {
      if (this->read(stats(row) + index).x == high) first = index;
    }
    first = __reduce_min_sync(kAllLanes, first);
    if (first == ~0u) return 0;
    RawTile<kType> raw;
    TileOfRow<kType>::load(raw, row_data(row), vocab_, first, args_.aligned);
    LaneTile tile;
    raw.unpack(tile);
    uint32_t place = ~0u;
#pragma unroll
    for (int i = 31; i >= 0; --i) {
      if (tile.x[i] == high) place = static_cast<uint32_t>(LaneTile::element_of(i));
    }
    place = __reduce_min_sync(kAllLanes, place);
    return static_cast<int64_t>(first) * kTile +
           (place == ~0u ? 0 : place);  // none: statistics of another row
  }

  // The law of a row, and what it says of the drafted token.
  __device__ __forceinline__ ChainRecord record_of(uint32_t row, const RowLaw& law,
                                                   const ChainNode& node) const {
    double prob = 0.0;
    if (node.token >= 0 && law.usable) {
      prob = law.kind == LawKind::point
                 ? (node.token == law.top ? 1.0 : 0.0)
                 : probability_in(law, of_target(row) ? node.of_target : node.of_draft);
    }
    return {law, prob};
  }

  // To every block. By one warp.
  __device__ __forceinline__ ChainRecord publish(uint32_t row, const RowLaw& law, const ChainNode& node) {
    const ChainRecord record = record_of(row, law, node);
    if (static_cast<uint32_t>(lane_id()) < size_)
      *of_block(&shared_.records[row], static_cast<uint32_t>(lane_id())) = record;
    return record;
  }

  __device__ __forceinline__ RowTask task_of(uint32_t row) const {
    return {{row_data(row), kType, vocab_}, shared_.reading[of_target(row) ? 0 : 1], stats(row), lanes(row)};
  }

  const ChainArgs& args_;
  ChainShared& shared_;
  const uint32_t rank_, size_, warp_;
  int64_t b_;
  uint32_t part_, vocab_, tiles_;
  RowScratch* row_scratch_ = nullptr;
  TileStats* stats_;
  const char* rows_ = nullptr;  // of a tree's request: the first of the target ...
  int32_t num_rows_ = 0;        // ... and how many
  const uint64_t* seed_ = nullptr;
  int32_t drafts_ = 0, status_ = 0;
  bool usable_ = true, greedy_ = false, dense_ = false;
};

}  // namespace foretoken::cuda

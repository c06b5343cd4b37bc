// Verification of trees whose drafts were chosen, not drawn, and of chains of such: the walk from the root
// that decides on each node by its own target row alone, see walk_siblings() of math/tree_walk.hpp. The first
// rows are read by all clusters of a request; then one of them goes on alone and reads a row when the walk
// has come to it, so that rows beside the path cost nothing. Every block makes the law of the row for itself,
// from the statistics that all have left, and decides for itself.
#pragma once

#include "cuda/chain_draw.cuh"

namespace foretoken::cuda {

template <DType kType>
class TreeVerifier : ChainDraw<kType, true> {
 public:
  __device__ __forceinline__ TreeVerifier(const ChainArgs& args, TreeShared& shared)
      : Base(args, shared.rows), tree_(shared) {}

  __device__ __forceinline__ void run() {
    RowTiles tiles = first_tiles();
    RawTile<kType> raw;
    if (tiles.any()) this->load(tiles.row(), tiles.index(), raw);
    const Proposed proposed = read_proposal();
    if (!this->read_header()) {
      if (part_ == 0 && rank_ == 0) write(0, -1, status_, 0);
      return;
    }
    const float of_target = look_ahead(proposed);
    this->stream(raw, tiles);
    if (threadIdx.x < kMaxNodes) tree_.nodes[threadIdx.x].of_target = of_target;
    if (!this->goes_on()) return;
    judge();
    if (this->is_filtered(0)) return walk_filtered(args_, tree_);
    walk<false>();
  }

 private:
  using Base = ChainDraw<kType, true>;
  using typename Base::Rows;
  using RowTiles = typename Rows::RowTiles;
  using Base::args_;
  using Base::b_;
  using Base::drafts_;
  using Base::element;
  using Base::greedy_;
  using Base::part_;
  using Base::rank_;
  using Base::shared_;
  using Base::size_;
  using Base::stats;
  using Base::status_;
  using Base::tiles_;
  using Base::usable_;
  using Base::vocab_;
  using Base::warp_;

  __device__ __forceinline__ int32_t first_rows() const {
    return args_.first_rows < this->num_rows_ ? args_.first_rows : this->num_rows_;
  }
  __device__ __forceinline__ RowTiles first_tiles() const {
    const uint32_t clusters = static_cast<uint32_t>(args_.clusters);
    // The first warps, which look ahead meanwhile, come last.
    return RowTiles(((kWarps - 1 - warp_) * size_ + rank_) * clusters + part_, size_ * kWarps * clusters, 0,
                    1, static_cast<uint32_t>(first_rows()), tiles_);
  }

  // Of the row that the walk has come to, and of its first child's where warps would be idle. By all threads,
  // behind a barrier that follows the decision.
  __device__ __forceinline__ RowTiles next_tiles() {
    const int32_t guess = tree_.guess;
    const bool guesses = guess >= tree_.read && size_ * kWarps >= 2 * tiles_;
    if (threadIdx.x == 0) tree_.guessed = guesses ? guess : kNoNode;
    return RowTiles(warp_ * size_ + rank_, size_ * kWarps, static_cast<uint32_t>(tree_.next),
                    static_cast<uint32_t>(guess), guesses ? 2 : 1, tiles_);
  }

  struct Proposed {
    int64_t token = -1, parent = -1;
  };

  // Of the node that is this thread's, whether it counts or not.
  __device__ __forceinline__ Proposed read_proposal() const {
    const int32_t node = static_cast<int32_t>(threadIdx.x);
    Proposed found;
    if (node < 1 || node > args_.most_drafts) return found;
    found.token = read_number(args_.draft_tokens, b_, node - 1);
    found.parent = args_.parents.data ? read_number(args_.parents, b_, node - 1) : int64_t{node} - 1;
    return found;
  }

  // What can be known of the nodes before any law is; a thread for each node. Returns what is still on its
  // way from memory: the element of the node's token.
  __device__ __forceinline__ float look_ahead(const Proposed& proposed) {
    const int32_t node = static_cast<int32_t>(threadIdx.x);
    if (node >= kMaxNodes) return 0.0f;
    const uint64_t seed = *this->seed_, base = static_cast<uint64_t>(read_number(args_.base, b_));
    if (node == 0) {
      tree_.seed = seed;
      tree_.base = base;
      tree_.read = first_rows();
      tree_.guessed = kNoNode;
      tree_.made = 0;
      tree_.node = tree_.depth = 0;
    }
    TreeNode found{-1, kNoNode, 0, 0.0f};
    float of_target = 0.0f;
    if (node >= 1 && node <= drafts_) {
      if (proposed.token >= 0 && proposed.token < static_cast<int64_t>(vocab_))
        found.token = static_cast<int32_t>(proposed.token);
      if (proposed.parent >= 0 && proposed.parent < node)
        found.parent = static_cast<int32_t>(proposed.parent);
      if (found.token >= 0 && found.parent >= 0)
        of_target = element(static_cast<uint32_t>(found.parent), static_cast<uint32_t>(found.token));
      found.coin = random_coin(seed, base, static_cast<uint32_t>(node));
    }
    tree_.nodes[node] = found;
    return of_target;
  }

  // Whether the proposal can be taken: judged before any coin, so that dropping it changes no law.
  __device__ __forceinline__ void judge() {
    const int32_t node = static_cast<int32_t>(threadIdx.x);
    bool sound = usable_;
    if (node >= 1 && node <= drafts_) {
      const TreeNode mine = tree_.nodes[node];
      int32_t depth = 1;
      if (args_.most_tokens <= drafts_) {
        for (int32_t at = mine.parent; at > 0 && depth < args_.most_tokens; at = tree_.nodes[at].parent)
          ++depth;
      }
      sound = sound && mine.token >= 0 && mine.parent >= 0 && depth < args_.most_tokens;
    }
    sound = __syncthreads_and(sound ? 1 : 0) != 0;
    if (threadIdx.x == 0) {
      tree_.length = sound ? drafts_ : 0;
      tree_.status = sound ? 0 : kBadDraft;
    }
    __syncthreads();
  }

  // A function of its own: calls from within a loop cost it registers.
  static __device__ __noinline__ void walk_filtered(const ChainArgs& args, TreeShared& shared) {
    TreeVerifier verifier(args, shared);
    verifier.drafts_ = shared.length;
    verifier.make_first_laws();
    verifier.template walk<true>();
  }

  // Filters take a block long: of the rows that were read first, every block makes one.
  __device__ __forceinline__ void make_first_laws() {
    int32_t rows = tree_.read < static_cast<int32_t>(size_) ? tree_.read : static_cast<int32_t>(size_);
    if (rows > tree_.length + 1) rows = tree_.length + 1;
    if (threadIdx.x == 0) tree_.made = rows;
    Base::make_filtered_laws(args_, shared_, 0, static_cast<uint32_t>(rows), drafts_);
    cluster_sync();
  }

  template <bool kFiltered>
  __device__ __forceinline__ void walk() {
    while (true) {
      const int32_t node = tree_.node;
      if constexpr (kFiltered) {
        make_filtered_law(node);
      } else {
        make_law(node);
      }
      if (warp_ == 0) decide(node);
      if (warp_ == 1) throw_closing_bits(node);
      __syncthreads();
      if (tree_.next < 0) break;
      if (!tree_.unread) continue;
      RowTiles tiles = next_tiles();
      RawTile<kType> raw;
      if (tiles.any()) this->load(tiles.row(), tiles.index(), raw);
      this->stream(raw, tiles);
      cluster_sync();
    }
    close();
  }

  __device__ __forceinline__ void make_filtered_law(int32_t node) {
    if (node < tree_.made) return __syncthreads();  // all know the last decision
    const uint32_t row = static_cast<uint32_t>(node);
    Base::make_filtered_laws(args_, shared_, row, row + 1, drafts_);
    cluster_sync();
  }

  __device__ __forceinline__ void throw_closing_bits(int32_t node) {
    const uint64_t bits = random_bits(tree_.seed, tree_.base, Purpose::close, static_cast<uint32_t>(node));
    if (lane_id() == 0) tree_.closing_bits = bits;
  }

  // The law of a row that was read, for the first warp of this block.
  __device__ __forceinline__ void make_law(int32_t node) {
    const RowReading& reading = shared_.reading[0];
    const TileStats* const tile = stats(static_cast<uint32_t>(node));
    constexpr int kEach = kMaxTiles / kThreads;
    float2 found[kEach];
    float high = -infinity();
    bool regular = true;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const uint32_t index = threadIdx.x + i * kThreads;
      found[i] = index < tiles_ ? Rows::read(tile + index) : make_float2(-infinity(), 0.0f);
      high = fmaxf(high, found[i].x);
      regular = regular && found[i].y <= static_cast<float>(kTile + 1) &&
                (reading.kind == LawKind::point || found[i].x < infinity());
    }
    high = max_of_warp(high);
    if (lane_id() == 0) tree_.warp_highs[warp_] = high;
    regular = __syncthreads_and(regular ? 1 : 0) != 0;
    RowLaw law;
    law.max = max_of_warp(tree_.warp_highs[lane_id() % kWarps]);
    law.usable = regular && law.max > -infinity();
    if (reading.kind == LawKind::point || !law.usable) {
      if (warp_ != 0) return;
      law.top = this->lowest(static_cast<uint32_t>(node), law.max);
      law.max = 0.0f;
    } else {
      law.kind = LawKind::logits;
      law.scale = reading.scale;
      law.cut = reading.floor_below(law.max);
      uint64_t mass = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) mass += mass_of_stats({found[i].x, found[i].y}, law);
      mass = sum_of_masses(mass);
      if (lane_id() == 0) tree_.warp_masses[warp_] = mass;
      __syncthreads();
      if (warp_ != 0) return;
      law.mass = sum_of_masses(lane_id() < kWarps ? tree_.warp_masses[lane_id()] : 0);
    }
    if (lane_id() == 0) shared_.records[node].law = law;
    __syncwarp();
  }

  // accepts_token(coin, prob / left, 1.0); nearly always it shows without the division.
  __device__ static __forceinline__ bool accepts(uint32_t coin, double prob, double left) {
    const double share = static_cast<double>(coin) * kCoinUnit * left;
    if (share < prob * (1.0 - 1e-15)) return true;
    if (share > prob * (1.0 + 1e-15)) return false;
    return accepts_token(coin, prob / left, 1.0);
  }

  // The child that is kept, or what rejected children take away of the row. By the first warp of a block; a
  // lane for each of 32 neighbouring nodes.
  __device__ __forceinline__ void decide(int32_t node) {
    const RowLaw law = shared_.records[node].law;
    const int32_t length = tree_.length;
    double rest = 1.0;  // what is left of the row, as it is reached
    int32_t removed = 0, next = kNoNode;
#pragma unroll 1
    for (int32_t first = node / kWarpSize * kWarpSize; law.usable && first <= length; first += kWarpSize) {
      const int32_t at = first + lane_id();
      const TreeNode mine = tree_.nodes[at];
      const bool is_child = mine.parent == node && at <= length;
      const unsigned children = __ballot_sync(kAllLanes, is_child);
      if (children == 0) continue;
      const unsigned elders = children & ((1u << lane_id()) - 1);
      const unsigned alike = __match_any_sync(kAllLanes, mine.token);
      bool repeated = !is_child || (alike & elders) != 0;
#pragma unroll 1
      for (int32_t i = 0; i < removed; ++i) repeated = repeated || tree_.removed[i].token == mine.token;
      double prob = 0.0;
      if (!repeated) {
        prob = law.kind == LawKind::point ? (mine.token == law.top ? 1.0 : 0.0)
                                          : probability_in(law, mine.of_target);
      }
      double left = 0.0;  // of the row, when this child is asked
#pragma unroll 1
      for (unsigned others = children; others != 0; others &= others - 1) {
        const int place = __ffs(static_cast<int>(others)) - 1;
        if (lane_id() == place) left = rest;
        rest -= __shfl_sync(kAllLanes, prob, place);
        if (rest < 0.0) rest = 0.0;
      }
      const unsigned kept =
          __ballot_sync(kAllLanes, !repeated && left > 0.0 && accepts(mine.coin, prob, left));
      if (kept != 0) {
        next = first + __ffs(static_cast<int>(kept)) - 1;
        break;
      }
      const unsigned distinct = __ballot_sync(kAllLanes, !repeated);
      if (!repeated)
        tree_.removed[removed + __popc(distinct & elders)] = {mass_of(weight_in(law, mine.of_target)),
                                                              mine.token};
      removed += __popc(distinct);
      __syncwarp();
    }
    const int32_t guess = next > 0 ? first_child(next) : kNoNode;
    if (lane_id() == 0) {
      tree_.next = next;
      tree_.guess = guess;
      tree_.num_removed = removed;
    }
    if (next < 0 || lane_id() != 0) return;
    tree_.node = next;
    tree_.path[tree_.depth++] = static_cast<int16_t>(next);
    tree_.unread = next >= tree_.read && next != tree_.guessed;
  }

  // By a warp.
  __device__ __forceinline__ int32_t first_child(int32_t node) const {
#pragma unroll 1
    for (int32_t first = node / kWarpSize * kWarpSize; first <= tree_.length; first += kWarpSize) {
      const unsigned children = __ballot_sync(kAllLanes, tree_.nodes[first + lane_id()].parent == node);
      if (children != 0) return first + __ffs(static_cast<int>(children)) - 1;
    }
    return kNoNode;
  }

  // Behind a barrier that follows the last decision.
  __device__ __forceinline__ void close() {
    const int32_t node = tree_.node;
    const RowLaw& law = shared_.records[node].law;
    ChainStep step{true, false, node, tree_.status, -1.0, -1, 0, -1, tree_.closing_bits};
    if (!law.usable) step.status |= kLawLost;
    if (!law.usable || greedy_) step.closing = law.top;
    const int64_t token = this->closing_token(step, 0, SeveralRemoved{tree_.removed, tree_.num_removed});
    if (rank_ == 0) write(tree_.depth, token, step.status, tree_.depth + 1);
    cluster_wait();  // others may still read this block's memory
  }

  // `emitted`: the drafts that are kept and the closing token; 0: nothing is. By a block, a thread for each
  // place of the outputs.
  __device__ __forceinline__ void write(int32_t accepted, int64_t closing, int32_t status,
                                        int32_t emitted) const {
    const int32_t i = static_cast<int32_t>(threadIdx.x);
    if (i < args_.most_tokens) {
      const bool there = i < emitted;
      const int32_t node = i == 0 || !there ? 0 : tree_.path[i - 1];  // whose row it is
      int64_t token = there ? closing : -1;
      if (there && i < accepted) token = tree_.nodes[tree_.path[i]].token;
      write_number(args_.tokens, token, b_, i);
      if (args_.path.data && i > 0) write_number(args_.path, there ? node : -1, b_, i - 1);
      if (args_.path_rows.data) {
        const int64_t first =
            args_.row_offsets.data ? read_number(args_.row_offsets, b_) : b_ * (args_.most_drafts + 1);
        write_number(args_.path_rows, there ? first + node : -1, b_, i);
      }
    }
    if (lane_id() != 0) return;
    if (warp_ == kWarps - 1) write_number(args_.num_emitted, emitted, b_);
    if (warp_ == kWarps - 2) write_number(args_.num_accepted, accepted, b_);
    if (warp_ == kWarps - 3) write_number(args_.next_token, closing, b_);
    if (warp_ == kWarps - 4) write_number(args_.status, status, b_);
    if (warp_ != kWarps - 5) return;
    // Unsigned, where any base of a damaged row has a result.
    const uint64_t base = static_cast<uint64_t>(read_number(args_.base, b_));
    write_number(args_.next_lengths, static_cast<int64_t>(base - 1 + static_cast<uint64_t>(emitted)), b_);
  }

  TreeShared& tree_;
};

}  // namespace foretoken::cuda

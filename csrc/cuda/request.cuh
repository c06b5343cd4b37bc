// One request of a verification, as the blocks that share it see it: where its rows lie, what was proposed.
#pragma once

#include "cuda/chain_args.hpp"
#include "cuda/draw.cuh"
#include "cuda/filter.cuh"
#include "cuda/race.cuh"
#include "cuda/tree_index.cuh"
#include "cuda/views.cuh"
#include "math/path_interval.hpp"
#include "math/tree_walk.hpp"
#include "ops/prepare.hpp"
#include "ops/verify.hpp"

namespace foretoken::cuda {

// Scratch in global memory, one share for each request. Nothing in it outlives the call but `arrivals`.
struct Workspace {
  TileStats* stats = nullptr;    // [B, 2 T + 1, tiles] of the target's rows, of the drafts', of one more
  float* lanes = nullptr;        // [B, 2 T + 1, tiles, 32]; null: no room was made for it
  ChainRecord* laws = nullptr;   // [B, 2 T + 1] of the kernel for chains
  MassEdit* edits = nullptr;     // [B, max_edits]
  NodeState* states = nullptr;   // [B, 32, T] of the walk: every lane of the leading warp has its own
  uint32_t* arrivals = nullptr;  // [B] clusters that are through with their share; 0 between calls
  int32_t max_edits = 0;
  // Of gbv; null where no request can ask for it.
  uint64_t* rank_keys = nullptr;  // [B, 2, V] tokens being sorted, before a pass and behind it ...
  int32_t* rank_ids = nullptr;    // ... [B, 2, V]
  float* first_laws = nullptr;    // [B, D, first_law_stride] of being first, by depth
  int64_t first_law_stride = 0;
};

struct alignas(16) VerifyLaunch {
  VerifyArgs args;
  PreparedRows prepared;
  Workspace workspace;
  int32_t clusters = 1;         // that read the rows of one request
  bool reads_all_rows = false;  // at once, rather than as the walk asks for them
};

struct VerifyParams {
  VerifyLaunch launch;
  float rates[kMaxNodes];  // of the synthetic rule
};

// What the leading warp asks of all others. About a row: that of node `first`, with its laws.
enum class Task : uint32_t {
  finish,
  laws,           // of target nodes first .. first + count - 1
  residual_sums,  // mass of [target - gain * draft]+, tile by tile
  exact_masses,   // the same to the last unit
  entropy,        // of the target's law
  likelier,       // how many elements are larger than bound
  race,           // the first in the race of the elements
  raw_law,        // plain softmax of the logits as given
  best,           // the largest element below bound, or equal to it and behind `below`
  rank,           // the law of being first in the path that `at` is the interval of, into the row `level`
  first_laws,     // of the first `count` such rows
  left_max,       // largest element of the draft's row without the first `count` children
  left_mass,      // its mass without them, in units of bound
};

struct Command {
  Task task = Task::finish;
  int32_t first = 0, count = 0;
  bool raw = false;         // the row as given
  bool with_draft = false;  // of two rows
  float gain = 0.0f, bound = 0.0f;
  int64_t below = -1;
  uint64_t seed = 0, position = 0;
  RowLaw target_law, draft_law;
  int32_t level = -1;  // of gbv: the draft's row is the law of being first at this depth
  PathInterval at;
  int64_t token = -1;
};

// Shared memory of a block. The leading block's holds what is known of the request.
struct RequestShared {
  VerifyLaunch launch;  // parameters that are passed on by address would be read through the L2
  FilterScratch filter;
  Command command;
  uint64_t part[kMaxCluster];           // a share of a result from each block
  RaceEntry race[kMaxCluster];          //
  RaceEntry warp_race[kWarps];          //
  int32_t unsolved[2 * kMaxNodes + 1];  // rows whose filters take a cluster
  int32_t num_unsolved;
  int32_t is_last;
  RowLaw raw_law;
  WaveRow wave_rows[2 * kMaxNodes];  // rows that are read together:
  Wave wave[2];                      // of the target, and of the drafts

  RowLaw target[kMaxNodes], draft[kMaxNodes];
  TreeIndex tree;
  bool tree_usable;
  uint8_t target_made[kMaxNodes];
  // Of the token of each node: what its parent's rows say of it, its coin; of each node: the bits that would
  // close it.
  float target_element[kMaxNodes], draft_element[kMaxNodes];
  double target_prob[kMaxNodes], draft_prob[kMaxNodes];
  uint32_t coin[kMaxNodes];
  uint64_t closing_bits[kMaxNodes];

  // The proposal; in every block.
  int32_t tokens[kMaxNodes];   // of nodes 1 ..; -1: outside the vocabulary
  int16_t parents[kMaxNodes];  // kNoNode: not a smaller node
  int16_t law_row[kMaxNodes];  // kNoNode: a point law; kBadRowIndex: outside the tensor
  uint8_t has_child[kMaxNodes];
  int16_t dense[kMaxNodes];  // nodes whose children were drawn from a law of the draft's
  int32_t num_dense;

  // Of gbv: the nodes that the best prefix ends in, and their children.
  int16_t prefix[kMaxNodes], followers[kMaxNodes];
};

constexpr int16_t kBadRowIndex = -2;

// Where the rows of request b lie.
class Request {
 public:
  __device__ Request(const VerifyLaunch& launch, int64_t b) : launch_(launch), args_(launch.args), b_(b) {
    vocab_ = args_.target_logits.shape[args_.target_logits.rank - 1];
    tiles_ = tiles_of(vocab_);
    max_nodes_ = args_.draft_tokens.shape[1] + 1;
  }

  __device__ int64_t index() const { return b_; }
  __device__ int64_t vocab() const { return vocab_; }
  __device__ int64_t tiles() const { return tiles_; }
  __device__ int64_t max_nodes() const { return max_nodes_; }
  __device__ const VerifyArgs& args() const { return args_; }

  // Rows of target logits that belong to the request; 0 if its offsets leave the tensor.
  __device__ int64_t target_rows() const {
    if (!args_.row_offsets) return args_.target_logits.shape[1];
    const int64_t first = read_index(args_.row_offsets, b_), last = read_index(args_.row_offsets, b_ + 1);
    return first >= 0 && last >= first && last <= args_.target_logits.shape[0] ? last - first : 0;
  }

  __device__ int64_t target_row_index(int32_t node) const {
    return args_.row_offsets ? read_index(args_.row_offsets, b_) + node : b_ * max_nodes_ + node;
  }

  __device__ DeviceRow raw_target_row(int32_t node) const {
    const TensorView& logits = args_.target_logits;
    return row_of(
        logits, args_.row_offsets ? offset_of(logits, target_row_index(node)) : offset_of(logits, b_, node));
  }

  __device__ DeviceRow target_row(int32_t node) const {
    if (launch_.prepared.target == nullptr) return raw_target_row(node);
    return {launch_.prepared.target + (b_ * max_nodes_ + node) * vocab_, DType::float32, vocab_};
  }

  // The row that a node's children were drawn from, in the drafter's own order: its law is made from that.
  __device__ DeviceRow own_draft_row(int32_t node, int64_t law_row) const {
    if (args_.draft_probs && args_.vocab_map) return draft_row(node, law_row);
    const PreparedRows& prepared = launch_.prepared;
    if (prepared.draft != nullptr) {
      const int64_t row = prepared.draft_row_of(b_, node, law_row);
      return {prepared.draft + row * prepared.draft_size, DType::float32, prepared.draft_size};
    }
    const TensorView& laws = args_.draft_logits ? args_.draft_logits : args_.draft_probs;
    DeviceRow row = row_of(laws, offset_of(laws, b_, law_row));
    if (!args_.vocab_map) row.size = row.size < vocab_ ? row.size : vocab_;
    return row;
  }

  // The same by target ids.
  __device__ DeviceRow draft_row(int32_t node, int64_t law_row) const {
    const PreparedRows& prepared = launch_.prepared;
    if (prepared.mapped == nullptr) return own_draft_row(node, law_row);
    return {prepared.mapped + prepared.draft_row_of(b_, node, law_row) * vocab_, DType::float32, vocab_};
  }

  __device__ bool draft_sound(int32_t node, int64_t law_row) const {
    const PreparedRows& prepared = launch_.prepared;
    return prepared.draft_unsound == nullptr ||
           prepared.draft_unsound[prepared.draft_row_of(b_, node, law_row)] == 0;
  }

  __device__ const TensorView& laws() const {
    return args_.topk_ids ? args_.topk_ids : args_.draft_logits ? args_.draft_logits : args_.draft_probs;
  }
  __device__ int64_t law_rows() const { return laws().shape[1]; }
  __device__ bool has_row_laws() const { return args_.draft_logits || args_.draft_probs; }

  // From here on those of the target's rows are those that came with the call, if any did: nobody writes
  // them.
  __device__ void use_given_stats() { given_ = args_.target_stats.data != nullptr; }
  __device__ bool has_given_stats() const { return given_; }

  // Row 0 .. T - 1 of the target, T .. 2 T - 1 of the drafts by node, 2 T: one more.
  __device__ TileStats* stats(int64_t row) const {
    if (given_ && row < max_nodes_) {
      return static_cast<TileStats*>(args_.target_stats.data) +
             target_row_index(static_cast<int32_t>(row)) * tiles_;
    }
    return launch_.workspace.stats + (b_ * (2 * max_nodes_ + 1) + row) * stats_tiles();
  }
  __device__ float* lanes(int64_t row) const {
    if (launch_.workspace.lanes == nullptr) return nullptr;
    return launch_.workspace.lanes + (b_ * (2 * max_nodes_ + 1) + row) * stats_tiles() * kWarpSize;
  }
  __device__ MassEdit* edits() const { return launch_.workspace.edits + b_ * launch_.workspace.max_edits; }
  // Lanes that walk side by side must not add to the same numbers.
  __device__ NodeState* states() const {
    return launch_.workspace.states + (b_ * kWarpSize + lane_id()) * max_nodes_;
  }
  __device__ uint32_t* arrivals() const { return launch_.workspace.arrivals + b_; }

  __device__ uint64_t* rank_keys(int which) const {
    return launch_.workspace.rank_keys + (b_ * 2 + which) * vocab_;
  }
  __device__ int32_t* rank_ids(int which) const {
    return launch_.workspace.rank_ids + (b_ * 2 + which) * vocab_;
  }
  // One element off every alignment: what can be read 16 bytes at a time is read as data that never changes,
  // and this is written in the same launch.
  __device__ float* first_law_data(int64_t level) const {
    const int64_t depth = args_.tokens.shape[1] - 1;
    return launch_.workspace.first_laws + (b_ * depth + level) * launch_.workspace.first_law_stride + 1;
  }
  __device__ DeviceRow first_law(int64_t level) const {
    return {first_law_data(level), DType::float32, vocab_};
  }

  // A drafter's own order may be longer than the target's vocabulary.
  __device__ int64_t stats_tiles() const {
    const int64_t own = has_row_laws() ? tiles_of(laws().shape[2]) : 0;
    return own > tiles_ ? own : tiles_;
  }

 private:
  __device__ static DeviceRow row_of(const TensorView& view, int64_t offset) {
    const int64_t bytes = view.dtype == DType::float32 ? 4 : 2;
    return {static_cast<const char*>(view.data) + offset * bytes, view.dtype, view.shape[view.rank - 1]};
  }

  const VerifyLaunch& launch_;
  const VerifyArgs& args_;
  const int64_t b_;
  int64_t vocab_, tiles_, max_nodes_;
  bool given_ = false;
};

// Whether this cluster is the one that goes on: all others of the request have read their share.
__device__ inline bool is_last_cluster(uint32_t* arrivals, int32_t clusters, RequestShared& shared) {
  cluster_sync();
  if (clusters == 1) return true;
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    __threadfence();
    const bool last = atomicAdd(arrivals, 1u) == static_cast<uint32_t>(clusters) - 1;
    if (last) *arrivals = 0;
    __threadfence();
    for (uint32_t rank = 0; rank < cluster_size(); ++rank) of_block(&shared, rank)->is_last = last ? 1 : 0;
  }
  cluster_sync();
  return shared.is_last != 0;
}

// Every warp's number, combined; this block's share goes into the leader's memory.
template <class Combine>
__device__ inline void share(RequestShared& shared, uint64_t of_warp, Combine combine) {
  if (lane_id() == 0) shared.filter.warp_words[threadIdx.x / kWarpSize] = of_warp;
  block_sync();
  if (threadIdx.x != 0) return;
  uint64_t all = shared.filter.warp_words[0];
#pragma unroll 1
  for (int warp = 1; warp < kWarps; ++warp) all = combine(all, shared.filter.warp_words[warp]);
  of_block(shared.part, 0)[cluster_rank()] = all;
}

// The sum over the tiles of a row.
template <class OfTile>
__device__ inline void add_up(RequestShared& shared, const DeviceRow& row, OfTile of_tile) {
  uint64_t sum = 0;
  for_own_tiles(tiles_of(row.size), [&](int64_t index) { sum += of_tile(index); });
  share(shared, sum, [](uint64_t a, uint64_t b) { return a + b; });
}

// The mass of a residual; those of its tiles stay in the leader's memory, for a draw that may follow.
__device__ inline void add_up_masses(RequestShared& shared, const Residual& residual, Task task) {
  add_up(shared, residual.target, [&](int64_t index) {
    const uint64_t mass = task == Task::exact_masses ? exact_mass(residual, index)
                                                     : mass_of_tile(residual_sum(residual, index), 1.0f);
    if (lane_id() == 0) of_block(shared.filter.bins, 0)[index] = mass;
    return mass;
  });
}

__device__ inline Filters filters_of(const SamplingView& sampling, int64_t slot) {
  return {sampling.temperature[slot], sampling.top_k[slot], sampling.top_p[slot], sampling.min_p[slot]};
}

}  // namespace foretoken::cuda

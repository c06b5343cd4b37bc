// One request of a verification, as the blocks that share it see it: where its rows lie, what was proposed.
#pragma once

#include "cuda/draw.cuh"
#include "cuda/filter.cuh"
#include "cuda/prepare.hpp"
#include "cuda/race.cuh"
#include "cuda/views.cuh"
#include "math/tree_walk.hpp"
#include "ops/verify.hpp"

namespace foretoken::cuda {

// Scratch in global memory, one share for each request. Nothing in it outlives the call but `arrivals`.
struct Workspace {
  TileStats* stats = nullptr;    // [B, 2 T + 1, tiles] of the target's rows, of the drafts', of one more
  float* lanes = nullptr;        // [B, 2 T + 1, tiles, 32]; null: no room was made for it
  float* sums = nullptr;         // [B, tiles] what the tiles of a residual weigh
  uint64_t* exact = nullptr;     // [B, tiles] their exact masses
  MassEdit* edits = nullptr;     // [B, max_edits]
  uint32_t* arrivals = nullptr;  // [B] clusters that are through with their share; 0 between calls
  int32_t max_edits = 0;
};

struct VerifyLaunch {
  VerifyArgs args;
  PreparedRows prepared;
  Workspace workspace;
  int32_t clusters = 1;         // that read the rows of one request
  bool reads_all_rows = false;  // at once, rather than as the walk asks for them
  float rates[kMaxNodes];       // of the synthetic rule
};

// What the leading warp asks of all others.
enum class Task : uint32_t {
  finish,
  laws,
  residual_sums,
  exact_masses,
  entropy,
  likelier,
  race,
  one_law,
  best
};

struct Command {
  Task task = Task::finish;
  int32_t first = 0, count = 0;  // laws: target nodes
  bool with_drafts = false;      // laws: and those of all nodes that have children
  Residual residual;             // the others: target row and law, and for residuals the drafts'
  Filters filters;               // one_law
  float bound = 0.0f;            // likelier: what is counted is larger; best: smaller ...
  int64_t below = -1;            // ... or equal, with a larger id
  uint64_t seed = 0, position = 0;
};

// Shared memory of a block. The leading block's holds what is known of the request.
struct RequestShared {
  FilterScratch filter;
  Command command;
  uint64_t part[kMaxCluster];           // a share of a result from each block
  RaceEntry race[kMaxCluster];          //
  RaceEntry warp_race[kWarps];          //
  int32_t unsolved[2 * kMaxNodes + 1];  // rows whose filters take a cluster
  int32_t num_unsolved;
  int32_t is_last;
  RowLaw one_law;

  RowLaw target[kMaxNodes], draft[kMaxNodes];
  NodeState states[kMaxNodes];
  TreeIndex tree;
  uint8_t target_made[kMaxNodes];

  // The proposal; in every block.
  int32_t tokens[kMaxNodes];   // of nodes 1 ..; -1: outside the vocabulary
  int16_t parents[kMaxNodes];  // kNoNode: not a smaller node
  int16_t law_row[kMaxNodes];  // kNoNode: a point law; kBadRowIndex: outside the tensor
  uint8_t has_child[kMaxNodes];
  int16_t dense[kMaxNodes];  // nodes whose children were drawn from a law of the draft's
  int32_t num_dense;
  float target_element[kMaxNodes],
      draft_element[kMaxNodes];  // of the token of each node, in its parent's rows
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

  // The row of a draft law in the drafter's own order, from which the law is made.
  __device__ DeviceRow own_draft_row(int64_t law_row) const {
    const TensorView& laws = args_.draft_logits ? args_.draft_logits : args_.draft_probs;
    DeviceRow row = row_of(laws, offset_of(laws, b_, law_row));
    if (!args_.vocab_map) row.size = row.size < vocab_ ? row.size : vocab_;
    if (args_.draft_probs && args_.vocab_map) return draft_row(law_row);
    if (launch_.prepared.draft != nullptr) {
      row = {launch_.prepared.draft + (b_ * laws.shape[1] + law_row) * row.size, DType::float32, row.size};
    }
    return row;
  }

  // The same by target ids.
  __device__ DeviceRow draft_row(int64_t law_row) const {
    if (launch_.prepared.mapped == nullptr) return own_draft_row(law_row);
    const int64_t rows = law_rows();
    return {launch_.prepared.mapped + (b_ * rows + law_row) * vocab_, DType::float32, vocab_};
  }

  __device__ bool draft_sound(int64_t law_row) const {
    return launch_.prepared.draft_unsound == nullptr ||
           launch_.prepared.draft_unsound[b_ * law_rows() + law_row] == 0;
  }

  __device__ const TensorView& laws() const {
    return args_.topk_ids ? args_.topk_ids : args_.draft_logits ? args_.draft_logits : args_.draft_probs;
  }
  __device__ int64_t law_rows() const { return laws().shape[1]; }
  __device__ bool has_row_laws() const { return args_.draft_logits || args_.draft_probs; }

  // Row 0 .. T - 1 of the target, T .. 2 T - 1 of the drafts by node, 2 T: one more.
  __device__ TileStats* stats(int64_t row) const {
    return launch_.workspace.stats + (b_ * (2 * max_nodes_ + 1) + row) * stats_tiles();
  }
  __device__ float* lanes(int64_t row) const {
    if (launch_.workspace.lanes == nullptr) return nullptr;
    return launch_.workspace.lanes + (b_ * (2 * max_nodes_ + 1) + row) * stats_tiles() * kWarpSize;
  }
  __device__ float* sums() const { return launch_.workspace.sums + b_ * tiles_; }
  __device__ uint64_t* exact() const { return launch_.workspace.exact + b_ * tiles_; }
  __device__ MassEdit* edits() const { return launch_.workspace.edits + b_ * launch_.workspace.max_edits; }
  __device__ uint32_t* arrivals() const { return launch_.workspace.arrivals + b_; }

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
};

__device__ inline Filters filters_of(const SamplingView& sampling, int64_t slot) {
  return {sampling.temperature[slot], sampling.top_k[slot], sampling.top_p[slot], sampling.min_p[slot]};
}

}  // namespace foretoken::cuda

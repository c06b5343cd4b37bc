// The blocks that work on one request together. One warp leads: it walks the tree, and where it needs to know
// something about whole rows it sends a command, which every block carries out on its share of the tiles.
#pragma once

#include "cuda/request.cuh"

namespace foretoken::cuda {

struct TeamFilters {
  Filters target, draft;
};

class Team {
 public:
  __device__ Team(const Request& request, const VerifyLaunch& launch, const TeamFilters& filters,
                  RequestShared& shared)
      : request_(request),
        launch_(launch),
        filters_(filters),
        shared_(shared),
        rank_(cluster_rank()),
        size_(cluster_size()),
        filters_targets_(filters.target.any(request.vocab())),
        filters_drafts_(request.args().draft_logits &&
                        filters.draft.any(request.args().draft_logits.shape[2])) {}

  __device__ uint32_t rank() const { return rank_; }
  __device__ uint32_t size() const { return size_; }
  __device__ bool leads() const { return rank_ == 0 && threadIdx.x < kWarpSize; }

  // Whether laws of the draft's rows have to be made: records spare them, lists are read by the leader.
  __device__ bool makes_draft_laws() const {
    return request_.has_row_laws() && !request_.args().draft_records;
  }

  // The statistics of target rows first .. first + count - 1, and of the rows of all dense nodes. `worker` of
  // `workers` warps; nothing is known of them before the next barrier of the cluster.
  __device__ void read_rows_of(int32_t first, int32_t count, bool with_drafts, int64_t worker,
                               int64_t workers) {
    const int32_t drafts = with_drafts && makes_draft_laws() ? shared_.num_dense : 0;
    const DType target_type = count > 0 ? request_.target_row(first).dtype : DType::float32;
    bool together = false;
    if (drafts > 0) {
      const DeviceRow row = request_.own_draft_row(shared_.law_row[shared_.dense[0]]);
      together = row.dtype == target_type && tiles_of(row.size) == request_.tiles();
    }
    const auto task_of = [&](int64_t i) {
      return i < count ? target_task(first + static_cast<int32_t>(i)) : draft_task(shared_.dense[i - count]);
    };
    with_dtype(target_type, [&](auto type) {
      read_rows<decltype(type)::value>(count + (together ? drafts : 0), request_.tiles(), worker, workers,
                                       task_of);
    });
    if (drafts == 0 || together) return;
    const DeviceRow row = request_.own_draft_row(shared_.law_row[shared_.dense[0]]);
    with_dtype(row.dtype, [&](auto type) {
      read_rows<decltype(type)::value>(drafts, tiles_of(row.size), worker, workers,
                                       [&](int64_t i) { return draft_task(shared_.dense[i]); });
    });
  }

  // Their laws, into the memory of the leading block; the rows are dealt out to the blocks.
  __device__ void make_laws(int32_t first, int32_t count, bool with_drafts) {
    const int32_t drafts = with_drafts && makes_draft_laws() ? shared_.num_dense : 0;
    if (filters_targets_ || (drafts > 0 && filters_drafts_)) {
      if (rank_ == 0 && threadIdx.x == 0) shared_.num_unsolved = 0;
      cluster_sync();
    }
    deal(
        count, filters_targets_, [&](int32_t i) { return first + i; },
        [&](int32_t node) { return target_task(node); }, filters_.target, of_block(shared_.target, 0), 0);
    deal(
        drafts, filters_drafts_, [&](int32_t i) { return static_cast<int32_t>(shared_.dense[i]); },
        [&](int32_t node) { return draft_task(node); }, filters_.draft, of_block(shared_.draft, 0),
        kMaxNodes);
    if (filters_targets_ || (drafts > 0 && filters_drafts_)) solve_the_rest();
  }

  // Carries out this block's share of a command; the barriers around it are the caller's.
  __device__ void execute(const Command& command) {
    const int64_t worker = rank_ + static_cast<int64_t>(size_) * (threadIdx.x / kWarpSize);
    const int64_t workers = static_cast<int64_t>(size_) * kWarps;
    const Residual& residual = command.residual;
    switch (command.task) {
      case Task::finish: return;
      case Task::laws:
        read_rows_of(command.first, command.count, command.with_drafts, worker, workers);
        cluster_sync();
        make_laws(command.first, command.count, command.with_drafts);
        return;
      case Task::residual_sums:
        add_up(residual, [&](int64_t index) {
          LaneTile weights;
          load_weights(residual, index, weights);
          const float sum = sum_of_tile([&](int i) { return weights.x[i]; });
          if (lane_id() == 0) request_.sums()[index] = sum;
          return mass_of_tile(sum, 1.0f);
        });
        return;
      case Task::exact_masses:
        add_up(residual, [&](int64_t index) {
          const uint64_t mass = exact_mass(residual, index);
          if (lane_id() == 0) request_.exact()[index] = mass;
          return mass;
        });
        return;
      case Task::entropy: return add_up(residual, [&](int64_t index) { return entropy_of(residual, index); });
      case Task::likelier:
        return add_up(residual, [&](int64_t index) { return count_above(residual, index, command.bound); });
      case Task::race: return race(command);
      case Task::one_law: return one_law(command);
      case Task::best: return best(command);
    }
  }

  __device__ RowTask target_task(int32_t node) const {
    return {request_.target_row(node), RowReading::of_logits(filters_.target.temperature),
            request_.stats(node), filters_targets_ ? request_.lanes(node) : nullptr};
  }

  __device__ RowTask draft_task(int32_t node) const {
    const int64_t row = request_.max_nodes() + node;
    const bool probs = static_cast<bool>(request_.args().draft_probs);
    return {request_.own_draft_row(shared_.law_row[node]),
            probs ? RowReading::of_probs() : RowReading::of_logits(filters_.draft.temperature),
            request_.stats(row), filters_drafts_ ? request_.lanes(row) : nullptr};
  }

 private:
  template <class NodeOf, class TaskOf>
  __device__ void deal(int32_t count, bool filtered, NodeOf node_of, TaskOf task_of, const Filters& filters,
                       RowLaw* laws, int32_t mark) {
    if (!filtered) {
      const int32_t step = static_cast<int32_t>(size_) * kWarps;
      for (int32_t i = static_cast<int32_t>(rank_ + size_ * (threadIdx.x / kWarpSize)); i < count;
           i += step) {
        const int32_t node = node_of(i);
        const RowLaw law = law_of_stats(task_of(node));
        if (lane_id() == 0) laws[node] = law;
      }
      return;
    }
    for (int32_t i = static_cast<int32_t>(rank_); i < count; i += static_cast<int32_t>(size_)) {
      const int32_t node = node_of(i);
      const RowTask task = task_of(node);
      RowLaw law = law_of_stats(task);
      __syncthreads();
      if (law.usable && law.kind == LawKind::logits) {
        if (!BlockFilter(task, shared_.filter).run(filters, law)) {
          __syncthreads();
          if (threadIdx.x == 0) {
            RequestShared* leader = of_block(&shared_, 0);
            leader->unsolved[atomicAdd(&leader->num_unsolved, 1)] = mark + node;
          }
          continue;
        }
        law.mass = mass_of_row(task.stats, tiles_of(task.row.size), law);
      }
      if (threadIdx.x == 0) laws[node] = law;
      __syncthreads();
    }
  }

  // Rows in which too many elements matter for one block.
  __device__ void solve_the_rest() {
    cluster_sync();
    const RequestShared* leader = of_block(&shared_, 0);
    const int32_t count = leader->num_unsolved;
    for (int32_t i = 0; i < count; ++i) {
      const int32_t marked = leader->unsolved[i];
      const bool of_draft = marked >= kMaxNodes;
      const int32_t node = of_draft ? marked - kMaxNodes : marked;
      const RowTask task = of_draft ? draft_task(node) : target_task(node);
      const int64_t tiles = tiles_of(task.row.size);
      RowLaw law;
      law.kind = LawKind::logits;
      law.scale = task.reading.scale;
      law.max = extremes_of(task.stats, tiles, law.kind).max;
      ClusterFilter(task, shared_.filter).run(of_draft ? filters_.draft : filters_.target, law);
      if (!leads()) continue;
      law.mass = mass_of_row(task.stats, tiles, law);
      if (lane_id() == 0) (of_draft ? shared_.draft : shared_.target)[node] = law;
    }
  }

  // The sum over the tiles of a row, this block's share of it into the leader's memory.
  template <class OfTile>
  __device__ void add_up(const Residual& residual, OfTile of_tile) {
    const int64_t tiles = tiles_of(residual.target.size), step = static_cast<int64_t>(size_) * kWarps;
    uint64_t sum = 0;
    for (int64_t index = rank_ + static_cast<int64_t>(size_) * (threadIdx.x / kWarpSize); index < tiles;
         index += step) {
      sum += of_tile(index);
    }
    share(sum, [](uint64_t a, uint64_t b) { return a + b; });
  }

  template <class Combine>
  __device__ void share(uint64_t of_warp, Combine combine) {
    if (lane_id() == 0) shared_.filter.warp_words[threadIdx.x / kWarpSize] = of_warp;
    __syncthreads();
    if (threadIdx.x == 0) {
      uint64_t all = shared_.filter.warp_words[0];
      for (int warp = 1; warp < kWarps; ++warp) all = combine(all, shared_.filter.warp_words[warp]);
      of_block(shared_.part, 0)[rank_] = all;
    }
  }

  // Weight * log2(1 / weight) in whole mass units: the same in any order.
  __device__ static uint64_t entropy_of(const Residual& residual, int64_t index) {
    const RowLaw& law = residual.target_law;
    LaneTile tile;
    load_tile(residual.target, index, false, tile);
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (tile.x[i] < law.cut) continue;
      const float weight = weight_of_logit(tile.x[i], law.max, law.scale, law.cut);
      sum += mass_of(weight * ((law.max - tile.x[i]) * law.scale));
    }
    return sum_of_warp(sum);
  }

  __device__ static uint64_t count_above(const Residual& residual, int64_t index, float bound) {
    LaneTile tile;
    load_tile(residual.target, index, false, tile);
    uint64_t count = 0;
#pragma unroll
    for (int i = 0; i < 32; ++i) count += tile.x[i] > bound ? 1 : 0;
    return sum_of_warp(count);
  }

  // The largest element below a bound that the law keeps, the lowest id first: its key, and its id inverted.
  __device__ void best(const Command& command) {
    const Residual& residual = command.residual;
    const int64_t tiles = tiles_of(residual.target.size), step = static_cast<int64_t>(size_) * kWarps;
    uint64_t most = 0;
    for (int64_t index = rank_ + static_cast<int64_t>(size_) * (threadIdx.x / kWarpSize); index < tiles;
         index += step) {
      LaneTile tile;
      load_tile(residual.target, index, false, tile);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int64_t token = index * kTile + LaneTile::element_of(i);
        const bool behind =
            tile.x[i] < command.bound || (tile.x[i] == command.bound && token > command.below);
        if (!behind || !(tile.x[i] >= residual.target_law.cut) || token >= residual.target.size) continue;
        // 0 and -0 are one element to the comparisons above, and have to be one key.
        const uint64_t key = key_of(tile.x[i] + 0.0f);
        const uint64_t entry = key << 32 | (0xFFFFFFFFull - static_cast<uint64_t>(token));
        most = entry > most ? entry : most;
      }
    }
#pragma unroll
    for (int step_ = 16; step_ >= 1; step_ /= 2) {
      const uint64_t other = __shfl_xor_sync(kAllLanes, most, step_);
      most = other > most ? other : most;
    }
    share(most, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  }

  __device__ void one_law(const Command& command) {
    const RowTask task{command.residual.target, RowReading::of_logits(command.filters.temperature),
                       request_.stats(2 * request_.max_nodes()), nullptr};
    const int64_t worker = rank_ + static_cast<int64_t>(size_) * (threadIdx.x / kWarpSize);
    with_dtype(task.row.dtype, [&](auto type) {
      read_rows<decltype(type)::value>(1, tiles_of(task.row.size), worker,
                                       static_cast<int64_t>(size_) * kWarps, [&](int64_t) { return task; });
    });
    cluster_sync();
    if (!leads()) return;
    const RowLaw law = law_of_stats(task);
    if (lane_id() == 0) shared_.one_law = law;
    __syncwarp();
  }

  __device__ void race(const Command& command) {
    const Residual& residual = command.residual;
    const RaceEntry best = race_in_block(residual.target, residual.target_law, command.seed, command.position,
                                         TensorView{}, shared_.warp_race);
    if (threadIdx.x == 0) of_block(shared_.race, 0)[rank_] = best;
  }

  const Request& request_;
  const VerifyLaunch& launch_;
  const TeamFilters filters_;
  RequestShared& shared_;
  const uint32_t rank_, size_;
  const bool filters_targets_, filters_drafts_;
};

}  // namespace foretoken::cuda

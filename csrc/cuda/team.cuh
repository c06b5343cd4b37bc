// The blocks that work on one request together. One warp leads: it walks the tree, and where it needs to know
// something about whole rows it sends a command, which every block carries out on its share of the tiles.
#pragma once

#include "cuda/cluster_filter.cuh"
#include "cuda/ranking.cuh"

namespace foretoken::cuda {

struct TeamFilters {
  Filters target, draft;
};

class Team {
 public:
  __device__ Team(const Request& request, const TeamFilters& filters, RequestShared& shared)
      : request_(request),
        filters_(filters),
        shared_(shared),
        rank_(cluster_rank()),
        size_(cluster_size()),
        filters_targets_(filters.target.any(request.vocab())),
        filters_drafts_(request.args().draft_logits &&
                        filters.draft.any(request.args().draft_logits.shape[2])) {}

  __device__ uint32_t size() const { return size_; }
  __device__ bool leads() const { return rank_ == 0 && threadIdx.x < kWarpSize; }

  // Whether laws of the draft's rows have to be made: records spare them, lists are read by the leader.
  __device__ bool makes_draft_laws() const {
    return request_.has_row_laws() && !request_.args().draft_records;
  }

  // The wave of target rows first .. first + count - 1, and of the rows of all dense nodes.
  __device__ __noinline__ void plan_wave(int32_t first, int32_t count, bool with_drafts) {
    if (request_.has_given_stats()) count = 0;
    const int32_t drafts = with_drafts && makes_draft_laws() ? shared_.num_dense : 0;
    block_sync();
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count + drafts; i += kThreads) {
      const RowTask task = i < count ? target_task(first + i) : draft_task(shared_.dense[i - count]);
      shared_.wave_rows[i] = {task.row.data, task.stats, task.lanes};
      Wave& wave = shared_.wave[i < count ? 0 : 1];
      if (i != 0 && i != count) continue;
      wave.rows = shared_.wave_rows + i;
      wave.dtype = task.row.dtype;
      wave.size = task.row.size;
      wave.reading = task.reading;
    }
    if (threadIdx.x == 0) {
      shared_.wave[0].count = static_cast<uint32_t>(count);
      shared_.wave[1].count = static_cast<uint32_t>(drafts);
    }
    block_sync();
  }

  // Its statistics, as far as they are the part of `worker` among `workers` warps; nothing is known of them
  // before the next barrier of the cluster.
  __device__ void read_wave(uint32_t worker, uint32_t workers) const {
    read_waves(shared_.wave, worker, workers);
  }

  // Their laws, into the memory of the leading block; the rows are dealt out to the blocks.
  __device__ __noinline__ void make_laws(int32_t first, int32_t count, bool with_drafts) {
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

  // Carries out the next command, by all warps: the one that leads comes from where it needs the answer, the
  // others come back at once. False: it was the last.
  __device__ __noinline__ bool carry_out() {
    cluster_sync_apart();
    const Command& command = shared_.command;
    if (command.task == Task::finish) return false;
    execute(command);
    cluster_sync_apart();
    return true;
  }

 private:
  // This block's share of a command; the barriers around it are the caller's.
  __device__ __noinline__ void execute(const Command& command) {
    if (command.task == Task::laws) {
      plan_wave(command.first, command.count, false);
      read_wave(rank_ + size_ * (threadIdx.x / kWarpSize), size_ * kWarps);
      cluster_sync();
      make_laws(command.first, command.count, false);
      return;
    }
    if (command.task == Task::rank) return TokenRanking(request_, command, shared_).run();
    if (command.task == Task::first_laws) return first_laws(command.count);
    Residual residual;
    residual.target =
        command.raw ? request_.raw_target_row(command.first) : request_.target_row(command.first);
    residual.target_law = command.target_law;
    residual.gain = command.gain;
    residual.draft_law = command.draft_law;
    if (command.with_draft) {
      residual.draft = command.level < 0 ? request_.draft_row(command.first, shared_.law_row[command.first])
                                         : request_.first_law(command.level);
    }
    switch (command.task) {
      case Task::residual_sums:
      case Task::exact_masses: return add_up_masses(shared_, residual, command.task);
      case Task::entropy:
        return add_up(shared_, residual.target, [&](int64_t index) { return entropy_of(residual, index); });
      case Task::likelier:
        return add_up(shared_, residual.target,
                      [&](int64_t index) { return count_above(residual, index, command.bound); });
      case Task::race: return race(residual, command);
      case Task::raw_law: return raw_law(residual.target);
      case Task::best: return best(residual, command);
      case Task::left_max: return left_max(residual, command);
      case Task::left_mass:
        return add_up(shared_, residual.draft,
                      [&](int64_t index) { return left_mass_of(residual, index, command); });
      default: return;
    }
  }

  __device__ RowTask target_task(int32_t node) const {
    return {request_.target_row(node), RowReading::of_logits(filters_.target.temperature),
            request_.stats(node), filters_targets_ ? request_.lanes(node) : nullptr};
  }

  __device__ RowTask draft_task(int32_t node) const {
    const int64_t row = request_.max_nodes() + node;
    const bool probs = static_cast<bool>(request_.args().draft_probs);
    return {request_.own_draft_row(node, shared_.law_row[node]),
            probs ? RowReading::of_probs() : RowReading::of_logits(filters_.draft.temperature),
            request_.stats(row), filters_drafts_ ? request_.lanes(row) : nullptr};
  }

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
      block_sync();
      if (law.usable && law.kind == LawKind::logits) {
        if (!BlockFilter(task, shared_.filter).run(filters, law)) {
          block_sync();
          if (threadIdx.x == 0) {
            RequestShared* leader = of_block(&shared_, 0);
            leader->unsolved[atomicAdd(&leader->num_unsolved, 1)] = mark + node;
          }
          continue;
        }
        law.mass = mass_of_row(task.stats, tiles_of(task.row.size), law);
      }
      if (threadIdx.x == 0) laws[node] = law;
      block_sync();
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

  // Weight * log2(1 / weight) in whole mass units: the same in any order.
  __device__ static uint64_t entropy_of(const Residual& residual, int64_t index) {
    const RowLaw& law = residual.target_law;
    LaneTile tile;
    load_tile(residual.target, index, false, tile);
    uint64_t sum = 0;
#pragma unroll 4
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
#pragma unroll 4
    for (int i = 0; i < 32; ++i) count += tile.x[i] > bound ? 1 : 0;
    return sum_of_warp(count);
  }

  // The largest element below a bound that the law keeps, the lowest id first: its key, and its id inverted.
  __device__ void best(const Residual& residual, const Command& command) {
    uint64_t most = 0;
    for_own_tiles(tiles_of(residual.target.size), [&](int64_t index) {
      LaneTile tile;
      load_tile(residual.target, index, false, tile);
#pragma unroll 4
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
    });
#pragma unroll
    for (int step_ = 16; step_ >= 1; step_ /= 2) {
      const uint64_t other = __shfl_xor_sync(kAllLanes, most, step_);
      most = other > most ? other : most;
    }
    share(shared_, most, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  }

  __device__ void raw_law(const DeviceRow& row) {
    const RowTask task{row, RowReading::of_logits(1.0f), request_.stats(2 * request_.max_nodes()), nullptr};
    for_own_tiles(tiles_of(row.size), [&](int64_t index) {
      const TileStats stats = stats_at(task, index);
      if (lane_id() == 0) task.stats[index] = stats;
    });
    cluster_sync();
    if (!leads()) return;
    const RowLaw law = law_of_stats(task);
    if (lane_id() == 0) shared_.raw_law = law;
    __syncwarp();
  }

  // Of the rows that ranking has written, as rows of probabilities; by depth, in the leading block's memory.
  __device__ __noinline__ void first_laws(int32_t count) {
    const int64_t tiles = request_.tiles();
    const auto task_of = [&](int64_t level) {
      return RowTask{request_.first_law(level), RowReading::of_probs(),
                     request_.stats(request_.max_nodes() + level), nullptr};
    };
    for_own_tiles(count * tiles, [&](int64_t item) {
      const RowTask task = task_of(item / tiles);
      const TileStats stats = stats_at(task, item % tiles);
      if (lane_id() == 0) task.stats[item % tiles] = stats;
    });
    cluster_sync();
    const int32_t step = static_cast<int32_t>(size_) * kWarps;
    for (int32_t i = static_cast<int32_t>(rank_ + size_ * (threadIdx.x / kWarpSize)); i < count; i += step) {
      const RowTask task = task_of(i);
      RowLaw law = law_of_stats(task);
      if (!law.usable) {
        const int64_t top = lowest_of(task.row, task.stats, extremes_of(task.stats, tiles, law.kind).max);
        law.top = top < task.row.size ? top : 0;  // a row of NaN has none
      }
      if (lane_id() == 0) of_block(shared_.draft, 0)[i] = law;
    }
  }

  __device__ static TileStats stats_at(const RowTask& task, int64_t index) {
    float lane_max = 0.0f;
    return stats_slowly(task.row, task.reading, index, lane_max);
  }

  __device__ void race(const Residual& residual, const Command& command) {
    const RaceEntry best = race_in_block(residual.target, residual.target_law, command.seed, command.position,
                                         TensorView{}, shared_.warp_race);
    if (threadIdx.x == 0) of_block(shared_.race, 0)[rank_] = best;
  }

  // A tile of the draft's row without the first children of a node, and the largest that is left.
  __device__ float load_left(const Residual& residual, int64_t index, const Command& command,
                             LaneTile& tile) const {
    const bool probs = residual.draft_law.kind == LawKind::probs;
    load_tile(residual.draft, index, probs, tile);
    int32_t seen = 0;
    for (int32_t node = command.first + 1; seen < command.count; ++node) {
      if (shared_.parents[node] != command.first) continue;
      ++seen;
      if (shared_.tokens[node] / kTile != index) continue;
      const int32_t place = shared_.tokens[node] % kTile;
#pragma unroll 4
      for (int i = 0; i < 32; ++i) {
        if (LaneTile::element_of(i) == place) tile.x[i] = probs ? 0.0f : -infinity();
      }
    }
    float high = -infinity();
#pragma unroll 4
    for (int i = 0; i < 32; ++i) high = fmaxf(high, tile.x[i]);
    return max_of_warp(high);
  }

  __device__ void left_max(const Residual& residual, const Command& command) {
    uint64_t most = 0;
    for_own_tiles(tiles_of(residual.draft.size), [&](int64_t index) {
      LaneTile tile;
      const uint64_t key = key_of(load_left(residual, index, command, tile));
      most = key > most ? key : most;
    });
    share(shared_, most, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  }

  __device__ uint64_t left_mass_of(const Residual& residual, int64_t index, const Command& command) const {
    const RowLaw& law = residual.draft_law;
    LaneTile tile;
    const float anchor = load_left(residual, index, command, tile);
    if (anchor < law.cut) return 0;
    if (law.kind == LawKind::probs) {
      const float sum = sum_of_tile([&](int i) { return tile.x[i] < law.cut ? 0.0f : tile.x[i]; });
      return mass_of_tile(sum, 1.0f / command.bound);
    }
    const float cut = fmaxf(law.cut, logits_floor(anchor, law.scale));
    return mass_of_tile(sum_of_weights(tile, anchor, law.scale, cut),
                        weight_of_logit(anchor, command.bound, law.scale, law.cut));
  }

  const Request& request_;
  const TeamFilters filters_;
  RequestShared& shared_;
  const uint32_t rank_, size_;
  const bool filters_targets_, filters_drafts_;
};

}  // namespace foretoken::cuda

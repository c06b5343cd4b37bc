// What one warp does for a request once enough of its rows has been read: the law of a row, the walk from the
// laws to the token that closes, and the draw of that token.
#pragma once

#include "cuda/chain_walk.cuh"
#include "cuda/queue_shared.cuh"
#include "cuda/warp_filter.cuh"

namespace foretoken::cuda {

template <DType kType>
class QueueRows : protected ChainRows<kType, false, QueueWarp> {
 protected:
  using Rows = ChainRows<kType, false, QueueWarp>;

  // By a warp, whose `warp` it is.
  __device__ __forceinline__ QueueRows(const QueueArgs& args, QueueShared& shared, uint32_t b)
      : Rows(args.chain, shared.warps[threadIdx.x / kWarpSize], b), queue_(args) {
    QueueWarp& warp = this->shared_;
    QueueHeader& known = shared.headers()[b];
    if (lane_id() == 0) {
      warp.records = args.chain.laws + static_cast<int64_t>(b) * (2 * args.chain.most_drafts + 3);
      warp.reading = known.reading;
    }
    __syncwarp();
    admitted_ = known.header.admitted;
    slot_ = known.header.slot;
    this->take_header(known.header);
  }

  __device__ __forceinline__ bool sums_two() const { return false; }  // there is room for one

  const QueueArgs& queue_;
  bool admitted_;
  int64_t slot_;
};

template <DType kType>
class QueueSettler : ChainWalk<QueueRows<kType>> {
 public:
  __device__ __forceinline__ QueueSettler(const QueueArgs& args, QueueShared& shared, uint32_t b)
      : Base(args, shared, b) {}

  // All tiles of a row have been read: its law, and what it says of the drafted token. True: it was the last
  // of the request's.
  __device__ __forceinline__ bool settle_row(uint32_t row) {
    ChainNode node{};
    node.token = -1;
    const bool target = this->of_target(row);
    const int32_t drafted = static_cast<int32_t>(target ? row : row - draft_row(0));
    if (drafted < drafts_) {
      node.token = token_of(drafted + 1);
      if (node.token >= 0) node.of_target = node.of_draft = element(row, static_cast<uint32_t>(node.token));
    }
    if (target && args_.given != nullptr) take_given(row);
    RowLaw law = this->law_of(row);
    if (law.usable && law.kind == LawKind::logits) filter(row, law);
    double prob = 0.0;
    if (node.token >= 0 && law.usable) {
      prob = law.kind == LawKind::point ? (node.token == law.top ? 1.0 : 0.0)
                                        : probability_in(law, node.of_target);
    }
    uint32_t before = 0;
    if (lane_id() == 0) {
      shared_.records[row] = {law, prob};
      fence();
      before = arrive(&queue_.requests[b_].laws_made, num_rows());
    }
    before = __shfl_sync(kAllLanes, before, 0);
    if (before != num_rows() - 1) return false;
    fence();
    return true;
  }

  // From the laws, or where the masses of a task are there, as far as it goes: to the verdict, or to another
  // task.
  __device__ __forceinline__ void go_on(int32_t number) {
    if (!this->admitted_) return write(0, -1, status_, 0);
    look_up();
    this->begin();
    bool whole = false;
    if (number != kNoTask) {
      const QueueTask& task = queue_.tasks[number];
      const ChainStep step = task.step;
      whole = task.whole;
      this->candidates_ = task.candidates;
      this->then(step);
      __syncwarp();
      if (step.close) {
        if (lane_id() == 0) shared_.step.summed = true;
      } else {
        Base::go_on([&](int32_t) { return summed_mass(); });
      }
    }
    proceed(whole);
  }

  __device__ __forceinline__ uint32_t num_rows() const {
    return static_cast<uint32_t>(drafts_ + 1 + (dense_ ? drafts_ : 0));
  }

  // Of a task.
  __device__ __forceinline__ void sum_tile(const QueueTask& task, uint32_t index) {
    const uint32_t row = static_cast<uint32_t>(task.step.node);
    const bool with_draft = task.step.gain >= 0.0;
    const auto found =
        this->residual_of_tile(row, with_draft ? draft_row(task.step.node) : row,
                               with_draft ? this->gain_of(task.step.gain, task.step.node) : 0.0f, index);
    if (lane_id() != 0) return;
    masses()[index] = found.mass;
    sums()[index] = found.sum;
  }

 private:
  using Base = ChainWalk<QueueRows<kType>>;
  using Base::args_;
  using Base::b_;
  using Base::dense_;
  using Base::draft_row;
  using Base::drafts_;
  using Base::element;
  using Base::queue_;
  using Base::seed_;
  using Base::shared_;
  using Base::slot_;
  using Base::stats;
  using Base::status_;
  using Base::tiles_;
  using Base::vocab_;

  __device__ __forceinline__ uint64_t summed_mass() const {
    uint64_t mass = 0;
    for (uint32_t i = lane_id(); i < tiles_; i += kWarpSize) mass += mass_of_tile(__ldcg(sums() + i), 1.0f);
    return sum_of_masses(mass);
  }
  __device__ __forceinline__ uint64_t* masses() const { return queue_.masses + b_ * tiles_; }
  __device__ __forceinline__ float* sums() const { return queue_.sums + b_ * tiles_; }

  // -1: none, or outside the vocabulary.
  __device__ __forceinline__ int32_t token_of(int32_t node) const {
    const int64_t token = read_number(args_.draft_tokens, b_, node - 1);
    return token >= 0 && token < static_cast<int64_t>(vocab_) ? static_cast<int32_t>(token) : -1;
  }

  // Where the table has changed since a graph was captured: the host sends filtered rows another way.
  __device__ __forceinline__ void filter(uint32_t row, RowLaw& law) const {
    const bool target = this->of_target(row);
    const Filters filters = filters_in(target ? args_.sampling : args_.draft_sampling, slot_);
    if (!filters.any(vocab_)) return;
    law =
        filtered({{this->row_data(row), kType, vocab_}, shared_.reading[target ? 0 : 1], stats(row), nullptr},
                 filters, law);
  }
  static __device__ __noinline__ RowLaw filtered(const RowTask task, const Filters filters, RowLaw law) {
    WarpFilter(task).run(filters, law);
    return law;
  }

  __device__ __forceinline__ void take_given(uint32_t row) {
    const TileStats* const from = args_.given + (b_ * (args_.most_drafts + 1) + row) * tiles_;
    for (uint32_t i = lane_id(); i < tiles_; i += kWarpSize) {
      const TileStats found = from[i];
      const bool regular = is_regular(found.max, found.sum, this->greedy_);
      *reinterpret_cast<float2*>(stats(row) + i) = make_float2(found.max, regular ? found.sum : infinity());
    }
    __syncwarp();
  }

  // What is known of the nodes without any law.
  __device__ __forceinline__ void look_up() {
    const int32_t node = lane_id();
    ChainNode found{};
    found.token = node >= 1 && node <= drafts_ ? token_of(node) : -1;
    if (found.token >= 0)
      found.of_target = element(static_cast<uint32_t>(node - 1), static_cast<uint32_t>(found.token));
    const uint64_t seed = *seed_, base = static_cast<uint64_t>(read_number(args_.base, b_));
    found.coin = random_coin(seed, base, static_cast<uint32_t>(node));
    found.closing_bits = args_.samples ? random_bits(seed, base, args_.purpose, args_.step)
                                       : random_bits(seed, base, Purpose::close, static_cast<uint32_t>(node));
    this->node_ = found;
  }

  // As far as it goes: the verdict, or another task.
  __device__ __forceinline__ void proceed(bool whole) {
    __syncwarp();
    ChainStep step = shared_.step;
    if (step.close) {
      int64_t token = step.closing;
      if (token < 0) {
        token = step.summed ? draw<true>(step) : step.gain < 0.0 && !whole ? draw<false>(step) : kUndecided;
        if (token < 0 && step.summed) {
          // Both laws agree to the last bit: what is left to draw from is the target. Of statistics that are
          // another row's not even that is left: any token will do.
          if (whole) token = 0;
          whole = true;
          step.gain = -1.0;
          step.removed = -1;
        }
      }
      if (token >= 0) return write(step.node, token, step.status, step.node + 1);
      step.summed = false;
    }
    if (lane_id() != 0) return;
    const uint32_t number = take_ticket(&queue_.counters->num_tasks);
    queue_.tasks[number] = {step, static_cast<uint32_t>(b_), this->candidates_, whole};
    raise(&task_ready(queue_, number));
  }

  __device__ __forceinline__ void write(int32_t last, int64_t closing, int32_t status, int32_t emitted) {
    const uint32_t lane = static_cast<uint32_t>(lane_id());
    if (args_.samples) {
      this->write_sample(lane, closing, status);
    } else {
      this->write_tokens(last, closing, emitted);
      this->write_output(lane, last, closing, status, emitted);
    }
    __syncwarp();
    if (lane == 0) take_ticket(&queue_.counters->num_settled);
  }

  // A token of the masses that a task left or, not kExact, of those that follow from the row's statistics if
  // these decide; see ChainDraw::draw. -1: there is no mass at all.
  template <bool kExact>
  __device__ __forceinline__ int64_t draw(const ChainStep& step) {
    const RowLaw law = shared_.records[step.node].law;
    const OneRemoved removed{step.removed, step.removed_mass};
    const auto mass_at = [&](uint32_t index) {
      uint64_t mass;
      if constexpr (kExact) {
        mass = __ldcg(masses() + index);
      } else {
        const float2 found = this->read(stats(static_cast<uint32_t>(step.node)) + index);
        mass = mass_of_stats({found.x, found.y}, law);
      }
      return removed.left_of_tile(index, mass);
    };
    const uint32_t each = (tiles_ + kWarpSize - 1) / kWarpSize,
                   first = each * static_cast<uint32_t>(lane_id());
    uint64_t mine = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < each; ++i) {
      if (first + i < tiles_) mine += mass_at(first + i);
    }
    const uint64_t up_to = sum_up_to_lane(mine), total = __shfl_sync(kAllLanes, up_to, kWarpSize - 1);
    uint64_t reach = 0;
    if constexpr (!kExact) {
      reach = reach_of_estimate(law.mass, tiles_, false);
      if (total / 4 < reach) return kUndecided;
    }
    const uint64_t left_of_all = multiply_high(step.bits, total);
    uint64_t begin = up_to - mine, left = 0;
    uint32_t tile = ~0u;
    if (left_of_all >= begin && left_of_all < up_to) {
#pragma unroll 1
      for (uint32_t i = first;; ++i) {
        const uint64_t mass = mass_at(i);
        left = left_of_all - begin;
        begin += mass;
        if (left >= mass) continue;
        const bool near = !kExact && ((i != 0 && left < reach) || (i != tiles_ - 1 && mass - left <= reach));
        if (!near) tile = i;
        break;
      }
    }
    const unsigned who = __ballot_sync(kAllLanes, tile != ~0u);
    if (who == 0) return kExact ? -1 : kUndecided;
    const int lane = __ffs(static_cast<int>(who)) - 1;
    return draw_in_tile(step, __shfl_sync(kAllLanes, tile, lane), __shfl_sync(kAllLanes, left, lane), reach,
                        removed);
  }

  // The element in whose interval `left` falls, counted in exact masses from the tile's first.
  __device__ __forceinline__ int64_t draw_in_tile(const ChainStep& step, uint32_t tile, uint64_t left,
                                                  uint64_t reach, const OneRemoved& removed) {
    const uint32_t row = static_cast<uint32_t>(step.node);
    const bool with_draft = step.gain >= 0.0;
    const uint32_t other_row = with_draft ? draft_row(step.node) : row;
    RawTile<kType> target_tile, draft_tile;
    TileOfRow<kType>::load(target_tile, this->row_data(row), vocab_, tile, args_.aligned);
    TileOfRow<kType>::load(draft_tile, this->row_data(other_row), vocab_, tile, args_.aligned);
    const RowLaw target = shared_.records[row].law, draft = shared_.records[other_row].law;
    const float gain = with_draft ? this->gain_of(step.gain, step.node) : 0.0f;
    uint64_t begin = 0;  // of the quarter
#pragma unroll 1
    for (uint32_t quarter = 0; quarter < 4; ++quarter) {
      const Eight of_target = next_quarter(target_tile), of_draft = next_quarter(draft_tile);
      const uint32_t first = tile * kTile + quarter * 256 + static_cast<uint32_t>(lane_id()) * 8;
      uint64_t masses[8], mine = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float weight =
            residual_weight(weight_of_logit(of_target.x[j], target.max, target.scale, target.cut),
                            weight_of_logit(of_draft.x[j], draft.max, draft.scale, draft.cut), gain);
        masses[j] = removed.holds(first + j) ? 0 : mass_of(weight);
        mine += masses[j];
      }
      const uint64_t up_to = begin + sum_up_to_lane(mine);
      uint64_t at = up_to - mine;
      int32_t found = -1;
      bool within = false;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint64_t end = at + masses[j];
        if (at <= left && left < end) {
          within = true;
          const bool near = reach != 0 && ((at != 0 && left - at < reach) || end - left <= reach);
          if (!near) found = static_cast<int32_t>(first + j);
        }
        at = end;
      }
      const unsigned who = __ballot_sync(kAllLanes, within);
      if (who != 0) {
        const int32_t drawn = __shfl_sync(kAllLanes, found, __ffs(static_cast<int>(who)) - 1);
        return drawn >= 0 ? static_cast<int64_t>(drawn) : kUndecided;
      }
      begin = __shfl_sync(kAllLanes, up_to, kWarpSize - 1);
    }
    return kUndecided;
  }
};

}  // namespace foretoken::cuda

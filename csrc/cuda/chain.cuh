// The short way through a verification: chains of at most 31 drafts without filters, one lane of the leading
// warp for each node. What a request needs beyond that is left to the general way, which can do everything;
// its code is thirty times as long, and most of a small call's time would go into fetching it.
#pragma once

#include "cuda/team.cuh"

namespace foretoken::cuda {

constexpr int64_t kMostOnShortWay = kWarpSize - 1;  // drafts

enum class Way : int32_t {
  done,
  general,        // nothing has happened yet
  general_alone,  // by this cluster: the others of the request have gone
};

class ChainVerifier {
 public:
  __device__ __forceinline__ ChainVerifier(const VerifyLaunch& launch, int64_t b, RequestShared& shared)
      : launch_(launch),
        args_(launch.args),
        shared_(shared),
        b_(b),
        rank_(cluster_rank()),
        size_(cluster_size()) {
    vocab_ = args_.target_logits.shape[2];
    tiles_ = tiles_of(vocab_);
  }

  // Called by all threads of the clusters of a request; `part`: which of them this is.
  __device__ __forceinline__ Way run(int64_t part) {
    if (!read_header()) return Way::general;
    plan();
    const uint32_t leaders = static_cast<uint32_t>(launch_.clusters);
    const uint32_t warp = (rank_ + size_ * (threadIdx.x / kWarpSize)) * leaders + static_cast<uint32_t>(part);
    if (warp < leaders) {
      look_ahead();
    } else {
      read_waves(shared_.wave, warp - leaders, size_ * kWarps * leaders - leaders);
    }
    if (!is_last_cluster(arrivals(), launch_.clusters, shared_)) return Way::done;
    if (rank_ == 0) make_laws();
    if (rank_ == 0 && threadIdx.x < kWarpSize) return lead();
    while (true) {
      cluster_sync();
      const Command& command = shared_.command;
      if (command.task == Task::finish) return command.raw ? Way::general_alone : Way::done;
      execute(command);
      cluster_sync();
    }
  }

 private:
  // False: something about the request is out of the ordinary. The same in all threads.
  __device__ __forceinline__ bool read_header() {
    const int64_t nodes = args_.draft_tokens.shape[1];
    const int64_t requested =
        args_.num_drafts
            ? static_cast<const int32_t*>(args_.num_drafts.data)[b_ * args_.num_drafts.strides[0]]
            : nodes;
    const int64_t slot =
        args_.slots ? static_cast<const int32_t*>(args_.slots.data)[b_ * args_.slots.strides[0]] : b_;
    if (requested < 0 || requested > nodes || slot < 0 || slot >= args_.sampling.size ||
        slot >= args_.draft_sampling.size) {
      return false;
    }
    drafts_ = static_cast<int32_t>(requested);
    seed_ = args_.sampling.seed[slot];
    temperature_ = args_.sampling.temperature[slot];
    draft_temperature_ = args_.draft_sampling.temperature[slot];
    dense_ = args_.draft_logits && temperature_ != 0.0f && args_.draw != Draw::deterministic &&
             args_.rule != Rule::target_only;
    if (temperature_ != 0.0f && has_filters(args_.sampling, slot)) return false;
    // Traversal of deterministic drafts is none of the two rules below.
    if (args_.rule == Rule::traversal && !dense_ && temperature_ != 0.0f) return false;
    return !dense_ || (draft_temperature_ != 0.0f && !has_filters(args_.draft_sampling, slot));
  }

  __device__ __forceinline__ bool has_filters(const SamplingView& sampling, int64_t slot) const {
    const int32_t top_k = sampling.top_k[slot];
    return (top_k > 0 && top_k < vocab_) || sampling.top_p[slot] < 1.0f || sampling.min_p[slot] > 0.0f;
  }

  __device__ __forceinline__ uint32_t* arrivals() const { return launch_.workspace.arrivals + b_; }

  __device__ __forceinline__ DeviceRow row_of(const TensorView& view, int64_t row) const {
    const int64_t bytes = view.dtype == DType::float32 ? 4 : 2;
    const int64_t offset = b_ * view.strides[0] + row * view.strides[1];
    return {static_cast<const char*>(view.data) + offset * bytes, view.dtype, vocab_};
  }

  __device__ __forceinline__ TileStats* stats(int64_t row) const {
    const int64_t rows = 2 * (args_.draft_tokens.shape[1] + 1) + 1;
    return launch_.workspace.stats + (b_ * rows + row) * tiles_;
  }

  __device__ __forceinline__ bool block_rule() const { return dense_ && args_.rule != Rule::rrs; }

  // Rows 0 .. drafts of the target, then rows 0 .. drafts - 1 of the drafts.
  __device__ __forceinline__ void plan() {
    const int32_t targets = drafts_ + 1, rows = targets + (dense_ ? drafts_ : 0);
    const int32_t i = static_cast<int32_t>(threadIdx.x);
    if (i < rows) {
      const DeviceRow row =
          i < targets ? row_of(args_.target_logits, i) : row_of(args_.draft_logits, i - targets);
      shared_.wave_rows[i] = {row.data, stats(i), nullptr};
    }
    if (i < 2) {
      Wave& wave = shared_.wave[i];
      wave.rows = shared_.wave_rows + i * targets;
      wave.count = static_cast<uint32_t>(i == 0 ? targets : rows - targets);
      wave.dtype = args_.target_logits.dtype;
      wave.size = vocab_;
      wave.reading = RowReading::of_logits(i == 0 ? temperature_ : draft_temperature_);
    }
    __syncthreads();
  }

  // What a lane knows of its node before any law is there. By the leading warp of each cluster.
  __device__ __forceinline__ void look_ahead() {
    const int32_t node = lane_id();
    const uint64_t base = static_cast<uint64_t>(read_index(args_.base, b_));
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {
      const Purpose purpose = which == 0 ? Purpose::accept : Purpose::close;
      const PhiloxWords words = random_words(seed_, base, purpose, static_cast<uint32_t>(node));
      if (which == 0) {
        coin_ = words.word[0];
      } else {
        closing_bits_ = static_cast<uint64_t>(words.word[1]) << 32 | words.word[0];
      }
    }
    if (node < 1 || node > drafts_) return;
    token_ = read_index(args_.draft_tokens, b_, node - 1);
    if (token_ < 0 || token_ >= vocab_) return;
    target_element_ = element_at(row_of(args_.target_logits, node - 1), token_);
    if (dense_) draft_element_ = element_at(row_of(args_.draft_logits, node - 1), token_);
  }

  // By the leading block.
  __device__ __forceinline__ void make_laws() const {
    const int32_t targets = drafts_ + 1, rows = targets + (dense_ ? drafts_ : 0);
#pragma unroll 1
    for (int32_t i = static_cast<int32_t>(threadIdx.x / kWarpSize); i < rows; i += kWarps) {
      const WaveRow& row = shared_.wave_rows[i];
      const Wave& wave = shared_.wave[i < targets ? 0 : 1];
      const RowLaw law = law_of_stats({{row.data, wave.dtype, vocab_}, wave.reading, row.stats, nullptr});
      if (lane_id() == 0) (i < targets ? shared_.target[i] : shared_.draft[i - targets]) = law;
    }
    __syncthreads();
  }

  // To be carried out by every block.
  __device__ __forceinline__ void execute(const Command& command) const {
    Residual residual;
    residual.target = row_of(args_.target_logits, command.first);
    residual.target_law = command.target_law;
    if (command.with_draft) residual.draft = row_of(args_.draft_logits, command.first);
    residual.draft_law = command.draft_law;
    residual.gain = command.gain;
    add_up_masses(shared_, residual, command.task);
  }

  __device__ __noinline__ uint64_t call(const Command& command) {
    __syncwarp();
    if (static_cast<uint32_t>(lane_id()) < size_) {
      of_block(&shared_, static_cast<uint32_t>(lane_id()))->command = command;
    }
    cluster_sync();
    if (command.task == Task::finish) return 0;
    execute(command);
    cluster_sync();
    return sum_of_warp(static_cast<uint32_t>(lane_id()) < size_ ? shared_.part[lane_id()] : uint64_t{0});
  }

  __device__ Command about(Task task, const Residual& residual, int32_t node) const {
    Command command;
    command.task = task;
    command.first = node;
    command.with_draft = residual.draft.data != nullptr;
    command.gain = residual.gain;
    command.target_law = residual.target_law;
    command.draft_law = residual.draft_law;
    return command;
  }

  __device__ Residual residual_at(int32_t node, bool with_draft, double gain) const {
    Residual residual;
    residual.target = row_of(args_.target_logits, node);
    residual.target_law = shared_.target[node];
    residual.stats = shared_.wave_rows[node].stats;
    if (!with_draft) return residual;
    residual.draft = row_of(args_.draft_logits, node);
    residual.draft_law = shared_.draft[node];
    residual.gain = gain_in_weights(gain, residual.target_law.mass, residual.draft_law.mass);
    return residual;
  }

  __device__ __noinline__ int64_t draw(const Residual& residual, int32_t node, bool summed) {
    TokenDraw draw(residual, shared_.filter.bins);
    if (residual.draft.data == nullptr) {
      draw.take_masses_of_row();
    } else if (!summed) {
      call(about(Task::residual_sums, residual, node));
    }
    const uint64_t bits = __shfl_sync(kAllLanes, closing_bits_, node);
    const int64_t token = draw.by_estimate(bits);
    if (token != kUndecided) return token;
    call(about(Task::exact_masses, residual, node));
    return draw.exactly(bits);
  }

  __device__ __forceinline__ Way lead() {
    const int32_t node = lane_id();
    const bool drafted = node >= 1 && node <= drafts_;
    bool regular = node > drafts_ || shared_.target[node].usable;
    double target_prob = 0.0, draft_prob = 1.0;
    bool accepted = false;
    if (drafted && token_ >= 0 && token_ < vocab_) {
      const RowLaw& target = shared_.target[node - 1];
      if (temperature_ == 0.0f) {
        accepted = token_ == target.top;
      } else {
        target_prob = probability_in(target, target_element_);
        if (dense_) {
          draft_prob = probability_in(shared_.draft[node - 1], draft_element_);
          regular = regular && shared_.draft[node - 1].usable && draft_prob > 0.0 && draft_prob < 1.001;
        }
        accepted = accepts_token(coin_, target_prob, draft_prob);
      }
    } else if (drafted) {
      regular = false;
    }
    Command done;
    if (!__all_sync(kAllLanes, regular)) {
      done.raw = true;
      call(done);
      return Way::general_alone;
    }
    int32_t last = 0;
    double gain = 1.0;
    bool summed = false;
    if (block_rule()) {
      last = from_the_last(target_prob, draft_prob, gain, summed);
    } else {
      const unsigned kept = __ballot_sync(kAllLanes, accepted) >> 1;
      last = __ffs(static_cast<int>(~kept)) - 1;
    }
    int64_t closing = shared_.target[last].top;
    if (temperature_ != 0.0f) closing = close(last, gain, summed);
    write(last, closing);
    call(done);
    return Way::done;
  }

  // Block verification, "Block verification accelerates speculative decoding" (Sun et al. 2024, algorithm 2):
  // walk_traversal() of math/tree_walk.hpp on a chain. The last draft kept; `gain` of the residual behind it.
  __device__ __forceinline__ int32_t from_the_last(double target_prob, double draft_prob, double& gain,
                                                   bool& summed) {
    double prefix = 1.0, mine = 1.0;
#pragma unroll 1
    for (int32_t node = 1; node <= drafts_; ++node) {
      const double target = __shfl_sync(kAllLanes, target_prob, node);
      const double draft = __shfl_sync(kAllLanes, draft_prob, node);
      prefix = extend_prefix(prefix, target, draft);
      if (lane_id() == node) mine = prefix;
    }
    // The coin already decides for most: no fraction is larger than the prefix, but for rounding.
    const int32_t node = lane_id();
    const bool is_last = node == drafts_;
    const bool may_pass = accepts_fraction(coin_, is_last ? mine : mine == 1.0 ? 1.0 : 1.001 * mine);
    unsigned candidates = __ballot_sync(kAllLanes, node >= 1 && node <= drafts_ && may_pass);
    while (candidates != 0) {
      const int32_t at = 31 - __clz(static_cast<int>(candidates));
      candidates &= ~(1u << at);
      const double kept = __shfl_sync(kAllLanes, mine, at);
      gain = kept > 0.0 ? 1.0 / kept : 0.0;
      summed = false;
      if (at == drafts_ || kept == 1.0) return at;
      const Residual residual = residual_at(at, true, gain);
      const double rest = static_cast<double>(call(about(Task::residual_sums, residual, at))) /
                          static_cast<double>(residual.target_law.mass);
      summed = true;
      const double fraction = block_fraction(kept, kept * rest);
      if (accepts_fraction(__shfl_sync(kAllLanes, coin_, at), fraction)) return at;
    }
    gain = 1.0;
    summed = false;
    return 0;
  }

  __device__ __forceinline__ int64_t close(int32_t last, double gain, bool summed) {
    Residual residual = residual_at(last, dense_ && last < drafts_, gain);
    if (!dense_ && last < drafts_) {
      const int64_t token = __shfl_sync(kAllLanes, token_, last + 1);
      if (lane_id() == 0) {
        const float weight = weight_in(residual.target_law, element_at(residual.target, token));
        launch_.workspace.edits[b_ * launch_.workspace.max_edits] = {token, 0, mass_of(weight)};
      }
      __syncwarp();
      residual.edits = launch_.workspace.edits + b_ * launch_.workspace.max_edits;
      residual.num_edits = 1;
    }
    const int64_t token = draw(residual, last, summed);
    if (token >= 0) return token;
    return draw(residual_at(last, false, 0.0), last, false);
  }

  __device__ __forceinline__ void write(int32_t last, int64_t closing) const {
    const int32_t i = lane_id();
    const int64_t token = __shfl_down_sync(kAllLanes, token_, 1);
    if (i <= args_.draft_tokens.shape[1]) {
      write_index(args_.tokens, i < last ? token : i == last ? closing : -1, b_, i);
      if (args_.path && i > 0) write_index(args_.path, i <= last ? i : -1, b_, i - 1);
    }
    if (i == 0) {
      write_index(args_.num_emitted, last + 1, b_);
      write_index(args_.num_accepted, last, b_);
      write_index(args_.next_token, closing, b_);
      write_index(args_.next_lengths, read_index(args_.base, b_) + last, b_);
      write_index(args_.status, 0, b_);
    }
  }

  const VerifyLaunch& launch_;
  const VerifyArgs& args_;
  RequestShared& shared_;
  const int64_t b_;
  const uint32_t rank_, size_;
  int64_t vocab_, tiles_;
  int32_t drafts_ = 0;
  uint64_t seed_ = 0;
  float temperature_ = 0.0f, draft_temperature_ = 0.0f;
  bool dense_ = false;
  // Of this lane's node, in the leading warp.
  uint32_t coin_ = 0;
  uint64_t closing_bits_ = 0;
  int64_t token_ = -1;
  float target_element_ = 0.0f, draft_element_ = 0.0f;
};

}  // namespace foretoken::cuda

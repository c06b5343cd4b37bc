// A request as the walks of math/tree_walk.hpp see it, for the leading warp: all of its lanes run the walk
// side by side, and call the team where whole rows have to be looked at.
#pragma once

#include "cuda/team.cuh"
#include "ops/walk.hpp"

namespace foretoken::cuda {

class VerifyRows {
 public:
  __device__ VerifyRows(const Request& request, Team& team, const TeamFilters& filters, RequestShared& shared)
      : request_(request), args_(request.args()), team_(team), filters_(filters), shared_(shared) {
    ignore_draft_laws_ = greedy() || args_.draw == Draw::deterministic || !request.laws();
  }

  // The tree as it stands in shared memory. False: the request is decoded without drafts. Judged from the
  // proposal alone, before any coin, so that dropping it changes no law.
  __device__ __noinline__ bool take_proposal(Rule rule) {
    if (rule == Rule::target_only || rule == Rule::coupled) ignore_draft_laws_ = true;
    bool usable = shared_.tree_usable && shape_suits(rule);
    if (usable && !ignore_draft_laws_) {
      make_draft_laws();
      usable = laws_usable();
    }
    if (!usable) root_alone();
    return usable;
  }

  __device__ void root_alone() {
    __syncwarp();
    build_tree_by_warp(shared_.tree, 1, shared_.parents);
    __syncwarp();
  }

  __device__ const TreeIndex& tree() const { return shared_.tree; }
  __device__ bool greedy() const { return filters_.target.temperature == 0.0f; }
  __device__ int64_t token(int32_t node) const { return shared_.tokens[node]; }
  __device__ uint32_t coin(int32_t node) const { return shared_.coin[node]; }
  __device__ uint64_t closing_bits(int32_t node) const { return shared_.closing_bits[node]; }
  __device__ DeviceRow target_row(int32_t node) const { return request_.target_row(node); }

  __device__ const RowLaw& target_law(int32_t node) {
    if (!shared_.target_made[node]) make_target_law(node);
    return shared_.target[node];
  }

  // The laws of target rows first .. first + count - 1 are there: so is what they say of the drafts.
  __device__ __noinline__ void note_made(int32_t first, int32_t count) {
    __syncwarp();
    for (int32_t i = lane_id(); i < count; i += kWarpSize) shared_.target_made[first + i] = 1;
    for (int32_t node = 1 + lane_id(); node < tree().nodes; node += kWarpSize) {
      const int32_t parent = shared_.parents[node];
      if (parent < first || parent >= first + count) continue;
      const RowLaw& law = shared_.target[parent];
      shared_.target_prob[node] = law.kind == LawKind::point
                                      ? (token(node) == law.top ? 1.0 : 0.0)
                                      : probability_in(law, shared_.target_element[node]);
    }
    __syncwarp();
  }

  // The interface of the walks.
  __device__ bool usable(int32_t node) { return target_law(node).usable; }
  __device__ bool dense(int32_t node) const { return !ignore_draft_laws_ && shared_.law_row[node] >= 0; }
  __device__ bool any_dense() const {
    for (int32_t node = 0; node < tree().nodes; ++node) {
      if (tree().first_child[node] != kNoNode && dense(node)) return true;
    }
    return false;
  }
  __device__ double target_prob(int32_t node, int32_t child) {
    target_law(node);
    return shared_.target_prob[child];
  }
  __device__ double draft_prob(int32_t, int32_t child) const { return shared_.draft_prob[child]; }
  __device__ __noinline__ double residual(int32_t node, double gain) {
    Residual residual = residual_of(node, gain);
    const uint64_t whole = residual.target_law.mass;
    if (residual.draft.data == nullptr) {
      uint64_t removed = 0;
      for (int i = lane_id(); i < residual.num_edits; i += kWarpSize) {
        removed += residual.edits[i].before - residual.edits[i].mass;
      }
      removed = sum_of_warp(removed);
      return removed < whole ? static_cast<double>(whole - removed) / static_cast<double>(whole) : 0.0;
    }
    return static_cast<double>(residual_mass(residual, node, gain)) / static_cast<double>(whole);
  }
  __device__ double left(int32_t node, int32_t count);
  __device__ bool removed(int32_t node, int32_t count, int32_t child) const {
    int32_t elder = tree().first_child[node];
    for (int32_t i = 0; i < count; ++i, elder = tree().next_sibling[elder]) {
      if (token(elder) == token(child)) return true;
    }
    return false;
  }
  __device__ __noinline__ double entropy(int32_t node) {
    const RowLaw& law = target_law(node);
    if (law.kind == LawKind::point) return 0.0;
    const double sum = static_cast<double>(ask(about(Task::entropy, node)));
    const double mass = static_cast<double>(law.mass);
    return log_positive(mass / kMassUnit) + kLn2 * (sum / mass);
  }
  __device__ double relative_prob(int32_t node, int32_t child) {
    const RowLaw& law = target_law(node);
    if (law.kind == LawKind::point) return token(child) == law.top ? 1.0 : 0.0;
    return static_cast<double>(weight_in(law, shared_.target_element[child]));
  }
  __device__ __noinline__ bool among_top(int32_t node, int32_t child, int32_t k) {
    const RowLaw& law = target_law(node);
    if (law.kind == LawKind::point) return (token(child) == law.top ? 0 : 1) < k;
    Command command = about(Task::likelier, node);
    command.bound = shared_.target_element[child];
    return static_cast<int64_t>(ask(command)) < k;
  }
  __device__ void ignore_draft_laws() { ignore_draft_laws_ = true; }
  // Of independent paths keeps the one that ranks first, with the law of being first in place of the drafts':
  // see cuda/first_path.cuh.
  __device__ void keep_first_path(int32_t num_paths);

  // The token whose Gumbel noise wins at this node.
  __device__ __noinline__ int64_t raced(int32_t node, uint64_t seed, uint64_t position) {
    if (target_law(node).kind == LawKind::point) return target_law(node).top;
    Command command = about(Task::race, node);
    command.seed = seed;
    command.position = position;
    call(command);
    RaceEntry best = shared_.race[0];
    for (uint32_t rank = 1; rank < team_.size(); ++rank) {
      if (finishes_first(shared_.race[rank], best)) best = shared_.race[rank];
    }
    return best.element;
  }

  // The closing token of a walk that left it to chance. A residual can round to nothing where both laws agree
  // to the last bit: then what is left to draw from is the target itself.
  __device__ int64_t draw(const TreeVerdict& verdict, uint64_t bits) {
    const int64_t token = draw_from(closing_of(verdict), bits, verdict.node, verdict.state.gain);
    return token >= 0 ? token : draw_from(whole(verdict.node), bits, verdict.node, 0.0);
  }

  __device__ __noinline__ void call(const Command& command) {
    __syncwarp();
    if (static_cast<uint32_t>(lane_id()) < team_.size())
      *of_block(&shared_.command, static_cast<uint32_t>(lane_id())) = command;
    team_.carry_out();
  }

  __device__ __noinline__ uint64_t ask(const Command& command) {
    call(command);
    uint64_t sum = 0;
    for (uint32_t rank = 0; rank < team_.size(); ++rank) sum += shared_.part[rank];
    return sum;
  }

  __device__ __noinline__ uint64_t most(const Command& command) {
    call(command);
    uint64_t most = 0;
    for (uint32_t rank = 0; rank < team_.size(); ++rank)
      most = shared_.part[rank] > most ? shared_.part[rank] : most;
    return most;
  }

  __device__ __noinline__ Residual whole(int32_t node) {
    Residual residual;
    residual.target = target_row(node);
    residual.target_law = target_law(node);
    residual.stats = request_.stats(node);
    return residual;
  }

  // The law of a node's logits as they were given, under the plain softmax.
  __device__ __noinline__ RowLaw raw_law(int32_t node) {
    Command command;
    command.task = Task::raw_law;
    command.first = node;
    command.raw = true;
    call(command);
    return shared_.raw_law;
  }

  __device__ __noinline__ Command about(Task task, int32_t node) {
    Command command;
    command.task = task;
    command.first = node;
    command.target_law = target_law(node);
    return command;
  }

 private:
  __device__ int32_t list_followers(int32_t nodes);
  __device__ uint64_t draft_mass(int32_t node, int64_t token) const;
  __device__ int64_t best_follower(int32_t node, int32_t followers);
  __device__ void spread_list(int32_t node, int32_t level);
  __device__ PathInterval rank_tokens(int32_t node, int32_t level, const PathInterval& at, int64_t best);
  __device__ void keep_ranked_path(int32_t last, int32_t depth);

  __device__ __noinline__ void make_target_law(int32_t node) {
    Command command;
    command.task = Task::laws;
    command.first = node;
    command.count = 1;
    call(command);
    note_made(node, 1);
  }

  __device__ __noinline__ bool shape_suits(Rule rule) const {
    const bool paths = args_.draw == Draw::iid_paths;
    if (rule == Rule::gbv) return paths && has_even_leaves(tree()) && all_or_none_dense();
    if (rule == Rule::spectr && args_.draw == Draw::without_replacement) return false;
    if (!paths || ignore_draft_laws_ || rule == Rule::target_only || rule == Rule::coupled) return true;
    for (int32_t node = 0; node < tree().nodes; ++node) {
      const int32_t children = children_of(tree(), node);
      if (node == 0 ? children != 0 && children != args_.num_paths : children > 1) return false;
    }
    return true;
  }

  __device__ bool all_or_none_dense() const {
    bool any_point = false;
    for (int32_t node = 0; node < tree().nodes; ++node) {
      any_point = any_point || (tree().first_child[node] != kNoNode && !dense(node));
    }
    return !any_point || !any_dense();
  }

  // Those that nobody has made yet: handed over, or given as lists.
  __device__ __noinline__ void make_draft_laws() {
    for (int32_t i = lane_id(); i < shared_.num_dense; i += kWarpSize) {
      const int32_t node = shared_.dense[i];
      const int64_t row = shared_.law_row[node];
      RowLaw& law = shared_.draft[node];
      if (args_.topk_ids) law = law_of_list(row);
      if (args_.draft_records) {
        const int64_t* record = static_cast<const int64_t*>(args_.draft_records.data) +
                                offset_of(args_.draft_records, request_.index(), row);
        law = read_record(record, args_.draft_records.strides[2], request_.own_draft_row(node, row).size);
      }
      if (args_.draft_logits && args_.vocab_map && law.top >= 0) {
        law.top = static_cast<const int32_t*>(args_.vocab_map.data)[law.top * args_.vocab_map.strides[0]];
        law.usable = law.usable && law.top >= 0 && law.top < request_.vocab();
      }
      law.usable = law.usable && request_.draft_sound(node, row);
    }
    __syncwarp();
    for (int32_t node = 1 + lane_id(); node < tree().nodes; node += kWarpSize) {
      const int32_t parent = shared_.parents[node];
      if (shared_.law_row[parent] < 0) continue;
      const RowLaw& law = shared_.draft[parent];
      shared_.draft_prob[node] = law.kind == LawKind::point
                                     ? (token(node) == law.top ? 1.0 : 0.0)
                                     : probability_in(law, shared_.draft_element[node]);
    }
    __syncwarp();
  }

  __device__ int64_t list_id(int64_t law_row, int64_t i) const {
    int64_t id = read_index(args_.topk_ids, request_.index(), law_row, i);
    if (id < 0 || !args_.vocab_map) return id;
    return id < args_.vocab_map.shape[0]
               ? static_cast<const int32_t*>(args_.vocab_map.data)[id * args_.vocab_map.strides[0]]
               : kForeign;
  }
  __device__ float list_prob(int64_t law_row, int64_t i) const {
    return static_cast<const float*>(
        args_.topk_probs.data)[offset_of(args_.topk_probs, request_.index(), law_row, i)];
  }
  __device__ bool counts(int64_t law_row, int64_t i) const {  // an entry that is not padding
    if (read_index(args_.topk_ids, request_.index(), law_row, i) < 0) return false;
    const int64_t id = list_id(law_row, i);
    return (id >= 0 && id < request_.vocab()) || list_prob(law_row, i) != 0.0f;
  }

  __device__ __noinline__ RowLaw law_of_list(int64_t row) const {
    RowLaw law;
    law.kind = LawKind::probs;
    law.cut = kLeastProb;
    double total = 0.0;
    const int64_t entries = args_.topk_ids.shape[2];
    for (int64_t i = 0; i < entries; ++i) {
      if (!counts(row, i)) continue;
      const int64_t id = list_id(row, i);
      const float prob = list_prob(row, i);
      law.usable = law.usable && id >= 0 && id < request_.vocab() && prob >= 0.0f && prob < 2.0f;
      for (int64_t other = 0; other < i; ++other)
        law.usable = law.usable && !(counts(row, other) && list_id(row, other) == id);
      law.max = prob > law.max ? prob : law.max;
      total += static_cast<double>(prob);
    }
    law.usable = law.usable && law.max > 0x1p-24f && total > 0.98 && total < 1.02;
    if (!law.usable) return law;
    law.scale = 1.0f / law.max;
    for (int64_t i = 0; i < entries; ++i) {
      if (counts(row, i)) law.mass += mass_of(weight_in(law, list_prob(row, i)));
    }
    return law;
  }

  // Every child must be possible under the law it is said to come from, and no more than certain: a record
  // may be that of another row.
  __device__ __noinline__ bool laws_usable() const {
    bool usable = true;
    for (int32_t node = lane_id(); node < tree().nodes; node += kWarpSize) {
      if (tree().first_child[node] == kNoNode) continue;
      usable = usable && shared_.law_row[node] != kBadRowIndex;
      if (!usable || !dense(node)) continue;
      usable = shared_.draft[node].usable;
      int32_t elders = 0;
      for (int32_t child = tree().first_child[node]; usable && child != kNoNode;
           child = tree().next_sibling[child]) {
        const double prob = draft_prob(node, child);
        usable = prob > 0.0 && prob < 1.001;
        if (args_.draw == Draw::without_replacement && removed(node, elders, child)) usable = false;
        ++elders;
      }
    }
    return __all_sync(kAllLanes, usable) != 0;
  }

  __device__ MassEdit edit_of(const Residual& residual, int64_t token, float gain, float weight) const {
    const float of_target = weight_in(residual.target_law, element_at(residual.target, token));
    const float left = fused(-gain, weight, of_target);
    return {token, mass_of(left > 0.0f ? left : 0.0f), mass_of(of_target)};
  }

  // The first `count` children of a node have no mass any more.
  __device__ __noinline__ void exclude_children(Residual& residual, int32_t node, int32_t count) {
    int edits = 0;
    int32_t child = tree().first_child[node];
    for (int32_t i = 0; i < count; ++i, child = tree().next_sibling[child]) {
      if (removed(node, i, child)) continue;
      if (lane_id() == 0) request_.edits()[edits] = edit_of(residual, token(child), 3e38f, 1.0f);
      ++edits;
    }
    __syncwarp();
    residual.edits = request_.edits();
    residual.num_edits = edits;
  }

  __device__ __noinline__ Residual residual_of(int32_t node, double gain) {
    Residual residual = whole(node);
    const RowLaw& law = shared_.draft[node];
    const int64_t row = shared_.law_row[node];
    if (law.kind == LawKind::point) {
      if (lane_id() == 0) request_.edits()[0] = edit_of(residual, law.top, 3e38f, 1.0f);
      __syncwarp();
      residual.edits = request_.edits();
      residual.num_edits = 1;
      return residual;
    }
    const float in_weights = gain_in_weights(gain, residual.target_law.mass, law.mass);
    if (ranked_ || request_.has_row_laws()) {
      residual.draft = ranked_ ? request_.first_law(tree().depth[node]) : request_.draft_row(node, row);
      residual.draft_law = law;
      residual.gain = in_weights;
      return residual;
    }
    int edits = 0;
    for (int64_t first = 0; first < args_.topk_ids.shape[2]; first += kWarpSize) {
      const int64_t i = first + lane_id();
      const bool there = i < args_.topk_ids.shape[2] && counts(row, i);
      const unsigned all = __ballot_sync(kAllLanes, there);
      if (there) {
        const int place = edits + __popc(all & ((1u << lane_id()) - 1));
        request_.edits()[place] =
            edit_of(residual, list_id(row, i), in_weights, weight_in(law, list_prob(row, i)));
      }
      edits += __popc(all);
    }
    __syncwarp();
    residual.edits = request_.edits();
    residual.num_edits = edits;
    return residual;
  }

  __device__ __noinline__ Residual closing_of(const TreeVerdict& verdict) {
    if (verdict.closing == Closing::bonus) return whole(verdict.node);
    if (dense(verdict.node)) return residual_of(verdict.node, verdict.state.gain);
    Residual residual = whole(verdict.node);
    exclude_children(residual, verdict.node, verdict.state.rejected);
    return residual;
  }

  // Mass of a residual with a draft row; the masses of its tiles stay for a draw from it.
  __device__ __noinline__ uint64_t residual_mass(const Residual& residual, int32_t node, double gain) {
    if (summed_node_ != node || summed_gain_ != gain) {
      summed_mass_ = ask(in_tiles(Task::residual_sums, residual, node));
      summed_node_ = node;
      summed_gain_ = gain;
    }
    return summed_mass_;
  }

  __device__ __noinline__ Command in_tiles(Task task, const Residual& residual, int32_t node) {
    Command command = about(task, node);
    command.with_draft = residual.draft.data != nullptr;
    command.draft_law = residual.draft_law;
    command.gain = residual.gain;
    if (ranked_ && command.with_draft) command.level = tree().depth[node];
    return command;
  }

  __device__ __noinline__ int64_t draw_from(const Residual& residual, uint64_t bits, int32_t node,
                                            double gain) {
    TokenDraw draw(residual, shared_.filter.bins);
    if (residual.draft.data != nullptr) {
      residual_mass(residual, node, gain);
    } else {
      draw.take_masses_of_row();
    }
    summed_node_ = kNoNode;  // a draw may use the masses up
    const int64_t token = draw.by_estimate(bits);
    if (token != kUndecided) return token;
    ask(in_tiles(Task::exact_masses, residual, node));
    return draw.exactly(bits);
  }

  static constexpr int64_t kForeign = int64_t{1}
                                      << 40;  // an id of the drafter's that the target does not have

  const Request& request_;
  const VerifyArgs& args_;
  Team& team_;
  const TeamFilters& filters_;
  RequestShared& shared_;
  bool ignore_draft_laws_ = false;
  bool ranked_ = false;            // the drafts' laws are those of the path that ranks first
  int32_t summed_node_ = kNoNode;  // of the last residual whose tiles were summed
  double summed_gain_ = 0.0;
  uint64_t summed_mass_ = 0;
};

// The share of the draft's law that the first `count` children have not. Counted anew rather than subtracted:
// after a token that was all but certain, little is left, and drafts are drawn from that.
inline __device__ __noinline__ double VerifyRows::left(int32_t node, int32_t count) {
  const RowLaw& law = shared_.draft[node];
  const auto taken = [&](int64_t id) {
    int32_t child = tree().first_child[node];
    for (int32_t i = 0; i < count; ++i, child = tree().next_sibling[child]) {
      if (token(child) == id) return true;
    }
    return false;
  };
  if (law.kind == LawKind::point) return taken(law.top) ? 0.0 : 1.0;
  const int64_t law_row = shared_.law_row[node];
  if (!request_.has_row_laws()) {
    double left = 0.0;
    for (int64_t i = 0; i < args_.topk_ids.shape[2]; ++i) {
      if (counts(law_row, i) && !taken(list_id(law_row, i))) {
        left += static_cast<double>(weight_in(law, list_prob(law_row, i)));
      }
    }
    return left * kMassUnit / static_cast<double>(law.mass);
  }
  Command command = about(Task::left_max, node);
  command.count = count;
  command.with_draft = true;
  command.draft_law = law;
  const float max = value_of(static_cast<uint32_t>(most(command)));
  if (!(max >= law.cut)) return 0.0;
  command.task = Task::left_mass;
  command.bound = max;
  const double mass = static_cast<double>(ask(command));  // in units of the likeliest token that is left
  return mass * static_cast<double>(weight_in(law, max)) / static_cast<double>(law.mass);
}

}  // namespace foretoken::cuda

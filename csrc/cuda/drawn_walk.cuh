// The walks of math/tree_walk.hpp over drawn drafts, by one thread of each block. It stops where it has to
// know how much a rejected draft leaves of a row, and goes on from there when all have looked; every block
// decides the same for itself.
#pragma once

#include "cuda/drawn_tree.cuh"

namespace foretoken::cuda {

class DrawnWalk {
 public:
  __device__ __forceinline__ DrawnWalk(const ChainArgs& args, ChainShared& shared, DrawnTree& tree)
      : args_(args), shared_(shared), tree_(tree) {}

  // What the laws say of the nodes. By the first warp of a block.
  __device__ __forceinline__ void begin() {
    DrawnNodes& nodes = tree_.nodes;
    bool sound = nodes.usable != 0;
    for (int32_t node = 1 + lane_id(); node < nodes.index.nodes; node += kWarpSize) {
      const int32_t parent = nodes.index.parent[node];
      tree_.target_prob[node] = probability(shared_.records[parent].law, node, nodes.of_target[node]);
      if (!drawn(parent)) continue;
      const RowLaw& law = shared_.records[law_record(parent)].law;
      const double prob = law.usable ? probability(law, node, nodes.of_draft[node]) : 0.0;
      tree_.draft_prob[node] = prob;
      sound = sound && prob > 0.0 && prob < 1.001;
      if (args_.without_replacement) sound = sound && !is_repeated(parent, node);
    }
    // Judged before any coin, so that dropping the proposal changes no law.
    sound = __all_sync(kAllLanes, sound) != 0;
    for (int32_t node = lane_id(); node < nodes.index.nodes; node += kWarpSize) tree_.known[node].gain = -1.0;
    if (lane_id() != 0) return;
    if (!sound) {
      nodes.index.nodes = 1;
      nodes.index.first_child[0] = kNoNode;
    }
    tree_.status = sound ? 0 : kBadDraft;
    tree_.rejection.row = kNoNode;
    tree_.closes = tree_.reads = tree_.sums = false;
    tree_.left_row = kNoNode;
    tree_.turn = 0;
    go_to(0);
  }

  // The masses of the residuals that were asked for are there. By the first warp of a block.
  __device__ __forceinline__ void take_sums(int turn) {
#pragma unroll 1
    for (int32_t which = 0; which < 2; ++which) {
      const int32_t node = which == 0 ? shared_.step.node : shared_.step.other;
      if (node < 0) return;
      const uint64_t mass = mass_of_turn(shared_.draw, turn, which);
      if (lane_id() != 0) continue;
      tree_.known[node] = {which == 0 ? shared_.step.gain : shared_.step.other_gain, mass, turn, which};
      tree_.turn = turn;
    }
  }

  // The statistics of what is left of a law are there. By the first warp of a block.
  __device__ __forceinline__ void take_left(const TileStats* stats) {
    const RowLaw& law = shared_.records[law_record(tree_.left_row)].law;
    const int64_t tiles = tiles_of(args_.vocab);
    const auto read = [&](int64_t index) { return __ldcg(reinterpret_cast<const float2*>(stats) + index); };
    float max = -infinity();
    for (int64_t index = lane_id(); index < tiles; index += kWarpSize) max = fmaxf(max, read(index).x);
    max = max_of_warp(max);
    uint64_t mass = 0;  // in units of the likeliest token that is left
    for (int64_t index = lane_id(); index < tiles && max >= law.cut; index += kWarpSize) {
      const float2 found = read(index);
      if (found.x < law.cut) continue;
      mass += mass_of_tile(found.y, weight_of_logit(found.x, max, law.scale, law.cut));
    }
    mass = sum_of_masses(mass);
    const double share = static_cast<double>(mass) * static_cast<double>(weight_in(law, max));
    if (lane_id() == 0) tree_.left = max >= law.cut ? share / static_cast<double>(law.mass) : 0.0;
  }

  // To where a residual is asked for, or to the end. By one thread.
  __device__ __forceinline__ void advance() {
#pragma unroll 1
    while (!tree_.closes) {
      if (tree_.rejection.row >= 0 && !finish_rejection()) return;
      tree_.closes = tree_.climbs ? climb() : go_down();
    }
    close();
  }

 private:
  __device__ __forceinline__ bool usable(int32_t node) const { return shared_.records[node].law.usable; }
  __device__ __forceinline__ bool drawn(int32_t node) const { return tree_.nodes.law_row[node] >= 0; }
  __device__ __forceinline__ int32_t law_record(int32_t node) const {
    return args_.most_drafts + 1 + tree_.nodes.law_row[node];
  }
  __device__ __forceinline__ int32_t younger(int32_t node) const {
    return tree_.nodes.index.next_sibling[node];
  }

  // Of the token of a node.
  __device__ __forceinline__ double probability(const RowLaw& law, int32_t node, float element) const {
    if (law.kind == LawKind::point) return tree_.nodes.token[node] == law.top ? 1.0 : 0.0;
    return probability_in(law, element);
  }

  // Whether one of the children before it has the token of `child`.
  __device__ __forceinline__ bool is_repeated(int32_t row, int32_t child) const {
#pragma unroll 1
    for (int32_t elder = tree_.nodes.index.first_child[row]; elder != child; elder = younger(elder)) {
      if (tree_.nodes.token[elder] == tree_.nodes.token[child]) return true;
    }
    return false;
  }

  // A division takes a thread as long as everything else at a node; most are by 1.
  __device__ __forceinline__ static double over(double a, double b) { return b == 1.0 ? a : a / b; }

  // left_of_target() and left_of_draft() of math/tree_walk.hpp.
  __device__ __forceinline__ double left_of_target(int32_t row, int32_t child) const {
    const NodeState& state = tree_.states[row];
    double left = tree_.target_prob[child];
    if (drawn(row)) {
      left -= state.gain * tree_.draft_prob[child];
    } else if (is_repeated(row, child)) {
      return 0.0;
    }
    return left > 0.0 && state.rest > 0.0 ? over(left, state.rest) : 0.0;
  }
  __device__ __forceinline__ double left_of_draft(int32_t row, int32_t child) const {
    return drawn(row) ? over(tree_.draft_prob[child], tree_.states[row].left) : 1.0;
  }

  __device__ __forceinline__ void go_to(int32_t node) {
    tree_.climbs = false;
    tree_.top = tree_.node = node;
    tree_.states[node] = NodeState{};
    tree_.child = tree_.nodes.index.first_child[node];
  }

  // A child of the node that the walk is at, or the end there: true.
  __device__ __forceinline__ bool go_down() {
    const int32_t top = tree_.top, child = tree_.child;
    if (child == kNoNode || !usable(top)) return true;
    if (tree_.nodes.suits[child]) {
      tree_.climbs = true;
      tree_.next[top] = static_cast<int16_t>(child);
    } else if (accepts_token(tree_.nodes.coin[child], left_of_target(top, child),
                             left_of_draft(top, child))) {
      go_to(child);
    } else {
      reject(top, child, 1.0, younger(child) != kNoNode, false);
    }
    return false;
  }

  // climb() of math/tree_walk.hpp, up to the next node that is decided on; true: it is kept.
  __device__ __forceinline__ bool climb() {
    int32_t node = tree_.node;
#pragma unroll 1
    while (tree_.next[node] != kNoNode && usable(node)) {
      const int32_t below = tree_.next[node];
      const double prefix =
          extend_prefix(tree_.states[node].prefix, left_of_target(node, below), left_of_draft(node, below));
      tree_.states[below] = NodeState{};
      tree_.states[below].prefix = prefix;
      tree_.next[below] = tree_.nodes.index.first_child[below];
      node = below;
      if (!(prefix > 0.0)) break;  // no coin keeps it, nor anything below
    }
    tree_.node = node;
    if (accepts_fraction(tree_.nodes.coin[node], tree_.states[node].prefix)) return true;
    const int32_t parent = tree_.nodes.index.parent[node];
    tree_.next[parent] = static_cast<int16_t>(younger(node));
    const Fate fate = fate_of(parent, node);
    reject(parent, node, tree_.states[parent].prefix, fate == Fate::open, fate == Fate::fails);
    return false;
  }

  // What is known of a row's node when its child has been rejected.
  enum class Fate { open, passes, fails };
  __device__ __forceinline__ Fate fate_of(int32_t row, int32_t child) const {
    const double prefix = tree_.states[row].prefix;
    if (younger(child) != kNoNode) return Fate::open;
    if (row == tree_.top || prefix == 1.0) return Fate::passes;
    return accepts_fraction(tree_.nodes.coin[row], 1.001 * prefix) ? Fate::open : Fate::fails;
  }

  __device__ __forceinline__ static double next_gain(const NodeState& state, double weight) {
    return state.gain + over(state.rest, weight * state.left);
  }

  __device__ __forceinline__ void reject(int32_t row, int32_t child, double weight, bool wanted, bool fails) {
    NodeState& state = tree_.states[row];
    Rejection rejection{weight, state.rest, row, wanted, false, false, fails};
    ++state.rejected;
    if (!drawn(row)) {
      if (!is_repeated(row, child)) state.rest -= tree_.target_prob[child];
      if (state.rest < 0.0) state.rest = 0.0;
    } else if (weight > 0.0 && state.left > 0.0) {
      state.gain = next_gain(state, weight);
      rejection.asks = wanted;
      rejection.leaves = args_.without_replacement && younger(child) != kNoNode;
    } else {
      state.rest = 0.0;
    }
    tree_.rejection = rejection;
  }

  // False: what is left is asked for.
  __device__ __forceinline__ bool finish_rejection() {
    const Rejection rejection = tree_.rejection;
    const int32_t row = rejection.row;
    NodeState& state = tree_.states[row];
    const bool certain = drawn(row) && shared_.records[law_record(row)].law.kind == LawKind::point;
    const bool sums = rejection.asks && !certain && tree_.known[row].gain != state.gain;
    const bool counts = rejection.leaves && !certain && tree_.left_row != row;
    if (sums || counts) {
      ask(row, true);
      tree_.sums = sums;
      tree_.left_row = counts ? row : kNoNode;
      return false;
    }
    if (rejection.leaves) state.left = certain ? 0.0 : tree_.left;
    tree_.left_row = kNoNode;
    if (rejection.asks) {
      const uint64_t whole = shared_.records[row].law.mass;
      uint64_t mass = tree_.known[row].mass;
      if (certain) {
        const uint64_t removed = certain_token(row).mass;
        mass = removed < whole ? whole - removed : 0;
      }
      state.rest = static_cast<double>(mass) / static_cast<double>(whole);
    }
    tree_.rejection.row = kNoNode;
    if (tree_.climbs) {
      if (rejection.fails) state.prefix = 0.0;
      if (rejection.wanted && row != tree_.top) {
        const double residual =
            rejection.before > 0.0 ? over(rejection.weight * state.rest, rejection.before) : 0.0;
        state.prefix = block_fraction(state.prefix, residual);
      }
      tree_.node = row;
      if (row != tree_.top) return true;
      tree_.climbs = false;
    }
    tree_.child = younger(tree_.child);
    return true;
  }

  // The only token of a law that is a point, as it is taken away from a node's row.
  __device__ __forceinline__ RemovedToken certain_token(int32_t node) const {
    const int64_t token = shared_.records[law_record(node)].law.top;
#pragma unroll 1
    for (int32_t child = tree_.nodes.index.first_child[node]; child != kNoNode; child = younger(child)) {
      if (tree_.nodes.token[child] == token) return removed_child(node, child);
    }
    return {0, -1};
  }
  __device__ __forceinline__ RemovedToken removed_child(int32_t node, int32_t child) const {
    const RowLaw& law = shared_.records[node].law;
    return {mass_of(weight_in(law, tree_.nodes.of_target[child])), tree_.nodes.token[child]};
  }

  // The mass of a row's residual, from all blocks; and where warps would be idle that of the next row upwards
  // that will be asked for if nothing below it is kept.
  __device__ __forceinline__ void ask(int32_t row, bool goes_on) {
    ChainStep step{false, false, row, tree_.status, tree_.states[row].gain, -1, 0, -1, 0};
    const int64_t tiles = tiles_of(args_.vocab);
    const bool idle = tiles <= 2 * static_cast<int64_t>(cluster_size()) * kWarps;
    if (goes_on && idle && tree_.climbs) look_up(step, row);
    tree_.sums = true;
    shared_.step = step;
  }

  __device__ __forceinline__ void look_up(ChainStep& step, int32_t row) const {
#pragma unroll 1
    while (row != tree_.top) {
      const int32_t child = row;
      row = tree_.nodes.index.parent[row];
      const NodeState& state = tree_.states[row];
      if (fate_of(row, child) == Fate::fails) continue;
      if (!drawn(row) || !(state.prefix > 0.0) || !(state.left > 0.0) ||
          shared_.records[law_record(row)].law.kind == LawKind::point)
        return;
      const double gain = next_gain(state, state.prefix);
      if (tree_.known[row].gain == gain) continue;
      step.other = row;
      step.other_gain = gain;
      return;
    }
  }

  // The walk has ended at its node.
  __device__ __forceinline__ void close() {
    const int32_t node = tree_.node;
    const NodeState& state = tree_.states[node];
    const RowLaw& law = shared_.records[node].law;
    ChainStep step{true, false, node, tree_.status, -1.0, -1, 0, -1, tree_.nodes.closing_bits[node]};
    tree_.reads = !tree_.wanted[node];
    if (tree_.reads) {
      tree_.wanted[node] = true;
      tree_.sums = step.close = false;
      shared_.step = step;
      return;
    }
    int32_t removed = 0;
    if (!law.usable) step.status |= kLawLost;
    if (!law.usable || shared_.reading[0].kind == LawKind::point) {
      step.closing = law.top;
    } else if (state.rejected > 0 && !drawn(node)) {
      int32_t child = tree_.nodes.index.first_child[node];
      for (int32_t i = 0; i < state.rejected; ++i, child = younger(child)) {
        if (!is_repeated(node, child)) tree_.removed[removed++] = removed_child(node, child);
      }
    } else if (state.rejected > 0 && shared_.records[law_record(node)].law.kind == LawKind::point) {
      tree_.removed[removed++] = certain_token(node);
    } else if (state.rejected > 0) {
      const KnownResidual& known = tree_.known[node];
      if (known.gain != state.gain || known.turn + 1 < tree_.turn) return ask(node, false);
      step.gain = state.gain;
      step.summed = true;
      step.which = known.which;
      tree_.turn = known.turn;
    }
    tree_.num_removed = removed;
    tree_.depth = path_to(tree_.nodes.index, node, tree_.path);
    shared_.step = step;
  }

  const ChainArgs& args_;
  ChainShared& shared_;
  DrawnTree& tree_;
};

// What rejected children leave of the law of the node that is asked about, tile by tile. By all warps of a
// cluster.
inline __device__ __noinline__ void count_what_is_left(const DrawnTree& tree, const DeviceRow& row,
                                                       const RowLaw& law, TileStats* stats) {
  const int32_t node = tree.left_row;
  for_own_tiles(tiles_of(row.size), [&](int64_t index) {
    LaneTile tile;
    load_tile(row, index, false, tile);
    int32_t child = tree.nodes.index.first_child[node];
    for (int32_t i = 0; i < tree.states[node].rejected; ++i, child = tree.nodes.index.next_sibling[child]) {
      const int32_t place = tree.nodes.token[child] - static_cast<int32_t>(index) * kTile;
#pragma unroll 4
      for (int e = 0; e < 32; ++e) {
        if (LaneTile::element_of(e) == place) tile.x[e] = -infinity();
      }
    }
    float high = -infinity();
#pragma unroll 4
    for (int e = 0; e < 32; ++e) high = fmaxf(high, tile.x[e]);
    const float max = max_of_warp(high);
    const float cut = fmaxf(law.cut, logits_floor(max, law.scale));
    const float sum = max >= law.cut ? sum_of_weights(tile, max, law.scale, cut) : 0.0f;
    if (lane_id() == 0) *reinterpret_cast<float2*>(stats + index) = make_float2(max, sum);
  });
}

// What is done next, into the step. By the first warp of a block; `turn`: of the last sums, -1: the laws
// alone are there. `left`: statistics of what is left of a law.
inline __device__ __noinline__ void walk_drawn_tree(const ChainArgs& args, ChainShared& shared,
                                                    DrawnTree& tree, int turn, const TileStats* left) {
  DrawnWalk walk(args, shared, tree);
  if (turn < 0) {
    walk.begin();
  } else {
    if (tree.sums) walk.take_sums(turn);
    if (tree.left_row >= 0) walk.take_left(left);
  }
  __syncwarp();
  if (lane_id() == 0) walk.advance();
  __syncwarp();
}

// `emitted`: the drafts that are kept and the closing token; 0: nothing is, and the tree is not looked at. By
// a block, a thread for each place of the outputs.
inline __device__ __noinline__ void write_drawn_tree(const ChainArgs& args, const DrawnTree& tree, int64_t b,
                                                     int64_t closing, int32_t status, bool emits) {
  const int32_t i = static_cast<int32_t>(threadIdx.x), accepted = emits ? tree.depth : 0;
  const int32_t emitted = emits ? accepted + 1 : 0;
  if (i < args.most_tokens) {
    const bool there = i < emitted;
    const int32_t node = i == 0 || !there ? 0 : tree.path[i - 1];  // whose row it is
    int64_t token = there ? closing : -1;
    if (there && i < accepted) token = tree.nodes.token[tree.path[i]];
    write_number(args.tokens, token, b, i);
    if (args.path.data && i > 0) write_number(args.path, there ? node : -1, b, i - 1);
    if (args.path_rows.data)
      write_number(args.path_rows, there ? b * (args.most_drafts + 1) + node : -1, b, i);
  }
  const int32_t warp = i / kWarpSize;
  if (lane_id() != 0) return;
  if (warp == kWarps - 1) write_number(args.num_emitted, emitted, b);
  if (warp == kWarps - 2) write_number(args.num_accepted, accepted, b);
  if (warp == kWarps - 3) write_number(args.next_token, closing, b);
  if (warp == kWarps - 4) write_number(args.status, status, b);
  if (warp != kWarps - 5) return;
  // Unsigned, where any base of a damaged row has a result.
  const uint64_t base = static_cast<uint64_t>(read_number(args.base, b));
  write_number(args.next_lengths, static_cast<int64_t>(base - 1 + static_cast<uint64_t>(emitted)), b);
}

}  // namespace foretoken::cuda

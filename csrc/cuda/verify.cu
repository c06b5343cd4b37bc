#include "cuda/verify.hpp"

#include "cuda/first_path.cuh"
#include "cuda/launch.hpp"
#include "cuda/prepare.hpp"
#include "cuda/verdict.cuh"
#include "cuda/verify_chain.hpp"

namespace foretoken::cuda {

namespace {

// Coins that were thrown for all nodes before the walk.
struct PhiloxCoins {
  uint64_t seed, base;
  const uint32_t* coin;

  __device__ bool token(int32_t node, double target_prob, double draft_prob) const {
    return accepts_token(coin[node], target_prob, draft_prob);
  }
  __device__ bool fraction(int32_t node, double h) const { return accepts_fraction(coin[node], h); }
  __device__ bool may_pass(int32_t node, double bound) const { return fraction(node, bound); }
  __device__ int64_t choose(VerifyRows& rows, int32_t node) const {
    return rows.raced(node, seed, base + static_cast<uint64_t>(rows.tree().depth[node]));
  }
};

__device__ int64_t close(VerifyRows& rows, const TreeVerdict& verdict, const PhiloxCoins& coins, Rule rule) {
  if (verdict.closing == Closing::chosen) return verdict.token;
  if (verdict.closing == Closing::argmax || rows.greedy()) return rows.target_law(verdict.node).top;
  if (rule == Rule::coupled) return coins.choose(rows, verdict.node);
  return rows.draw(verdict, rows.closing_bits(verdict.node));
}

// What is to be known of a request before anything is read: the same in all of its threads.
struct Header {
  bool admitted = false;
  int32_t status = 0;
  int64_t slot = -1;
  int32_t drafts = 0;  // as many as can be looked at; fewer than asked for: none is taken
  bool count_usable = false;
  Rule rule = Rule::rrs;
};

__device__ __noinline__ Header read_header(const VerifyLaunch& launch, const Request& request) {
  const VerifyArgs& args = launch.args;
  const int64_t b = request.index(), nodes = request.max_nodes() - 1;
  Header header;
  const int64_t requested = args.num_drafts ? read_index(args.num_drafts, b) : nodes;
  const int64_t slots =
      args.sampling.size < args.draft_sampling.size ? args.sampling.size : args.draft_sampling.size;
  header.slot = slot_of(args.slots, b, slots);
  if (requested == -1) return header;
  header.status = kBadRow;
  if (header.slot < 0) return header;
  int code = static_cast<int>(args.rule);
  if (args.rules) {
    if (header.slot >= args.rules.shape[0]) return header;
    code = static_cast<const uint8_t*>(args.rules.data)[header.slot * args.rules.strides[0]];
  }
  const int64_t rows = request.target_rows();
  const bool history =
      launch.prepared.history_unusable == nullptr || launch.prepared.history_unusable[b] == 0;
  if (code >= kRules || rows < 1 || !history) return header;
  header.admitted = true;
  header.status = 0;
  header.rule = static_cast<Rule>(code);
  header.count_usable = requested >= 0 && requested <= nodes && requested < rows;
  header.drafts = header.count_usable ? static_cast<int32_t>(requested) : 0;
  return header;
}

// Tokens, parents and law rows, into the memory of every block; and which rows of the draft's are read.
__device__ __noinline__ void load_proposal(const Request& request, int32_t drafts, bool reads_laws,
                                           RequestShared& shared) {
  const VerifyArgs& args = request.args();
  const int64_t b = request.index();
  const int32_t node = static_cast<int32_t>(threadIdx.x);
  static_assert(kThreads >= kMaxNodes);
  if (node < kMaxNodes) shared.has_child[node] = shared.target_made[node] = 0;
  if (node == 0) shared.num_dense = 0;
  block_sync();
  if (node >= 1 && node <= drafts) {
    const int64_t token = read_index(args.draft_tokens, b, node - 1);
    const int64_t parent = args.parents ? read_index(args.parents, b, node - 1) : int64_t{node} - 1;
    const bool known = parent >= 0 && parent < node;
    shared.tokens[node] = token >= 0 && token < request.vocab() ? static_cast<int32_t>(token) : -1;
    shared.parents[node] = known ? static_cast<int16_t>(parent) : kNoNode;
    if (known) shared.has_child[parent] = 1;
  }
  if (node <= drafts) {
    int16_t law_row = kNoNode;
    if (request.laws()) {
      const int64_t row = args.draft_row ? read_index(args.draft_row, b, node) : node;
      law_row = row == -1                              ? kNoNode
                : row >= 0 && row < request.law_rows() ? static_cast<int16_t>(row)
                                                       : kBadRowIndex;
    }
    shared.law_row[node] = law_row;
  }
  block_sync();
  if (threadIdx.x < kWarpSize && reads_laws) {
    int32_t dense = 0;
    for (int32_t first = 0; first <= drafts; first += kWarpSize) {
      const int32_t at = first + lane_id();
      const bool is_dense = at <= drafts && shared.has_child[at] && shared.law_row[at] >= 0;
      const unsigned all = __ballot_sync(kAllLanes, is_dense);
      if (is_dense) shared.dense[dense + __popc(all & ((1u << lane_id()) - 1))] = static_cast<int16_t>(at);
      dense += __popc(all);
    }
    if (lane_id() == 0) shared.num_dense = dense;
  }
  block_sync();
}

// All that can be known before a law is: the tree, its coins, and what the rows of each node's parent say of
// its token. By the leading warp, while the others read rows.
__device__ __noinline__ void look_ahead(const Request& request, const Header& header, bool reads_laws,
                                        RequestShared& shared) {
  const VerifyArgs& args = request.args();
  const int32_t drafts = header.drafts;
  const uint64_t seed = args.sampling.seed[header.slot];
  const uint64_t base = static_cast<uint64_t>(read_index(args.base, request.index()));
  for (int32_t node = lane_id(); node <= drafts; node += kWarpSize) {
    shared.coin[node] = random_coin(seed, base, static_cast<uint32_t>(node));
    shared.closing_bits[node] = random_bits(seed, base, Purpose::close, static_cast<uint32_t>(node));
    if (node == 0) continue;
    const int32_t parent = shared.parents[node], token = shared.tokens[node];
    if (parent < 0 || token < 0) continue;
    shared.target_element[node] = element_at(request.target_row(parent), token);
    const int32_t law_row = shared.law_row[parent];
    if (!reads_laws || law_row < 0) continue;
    float element = args.draft_logits ? -infinity() : 0.0f;
    if (request.has_row_laws()) {
      const DeviceRow row = request.draft_row(parent, law_row);
      if (token < row.size) element = element_at(row, token);
    } else {
      for (int64_t i = args.topk_ids.shape[2] - 1; i >= 0; --i) {
        int64_t id = read_index(args.topk_ids, request.index(), law_row, i);
        if (id >= 0 && args.vocab_map) {
          id = id < args.vocab_map.shape[0]
                   ? static_cast<const int32_t*>(args.vocab_map.data)[id * args.vocab_map.strides[0]]
                   : -1;
        }
        if (id != token) continue;
        element = static_cast<const float*>(
            args.topk_probs.data)[offset_of(args.topk_probs, request.index(), law_row, i)];
      }
    }
    shared.draft_element[node] = element;
  }
  bool usable = header.count_usable && build_tree_by_warp(shared.tree, drafts + 1, shared.parents);
  for (int32_t node = 1 + lane_id(); usable && node <= drafts; node += kWarpSize) {
    usable = shared.tokens[node] >= 0 && shared.tree.depth[node] < args.tokens.shape[1];
  }
  usable = __all_sync(kAllLanes, usable) != 0;
  if (!usable) build_tree_by_warp(shared.tree, 1, shared.parents);
  if (lane_id() == 0) shared.tree_usable = usable;
  __syncwarp();
}

__device__ __noinline__ void lead(const VerifyLaunch& launch, const Request& request, Team& team,
                                  const TeamFilters& filters, const Header& header, int32_t rows_made,
                                  const float* rates, RequestShared& shared) {
  const VerifyArgs& args = launch.args;
  VerifyRows rows(request, team, filters, shared);
  rows.note_made(0, rows_made);
  int32_t status = 0;
  if (!rows.take_proposal(header.rule)) status |= kBadDraft;
  WalkOptions options{header.rule, args.draw, args.num_paths, args.tolerance};
  options.tolerance.rates = rates;
  PhiloxCoins coins{args.sampling.seed[header.slot],
                    static_cast<uint64_t>(read_index(args.base, request.index())), shared.coin};
  const TreeVerdict verdict = walk(rows, rows.tree(), options, request.states(), coins);
  if (verdict.closing == Closing::argmax) status |= kLawLost;
  const int64_t drawn = close(rows, verdict, coins, options.rule);
  const int64_t closing = drawn > 0 ? drawn : 0;  // statistics of another row may leave nothing to draw
  VerdictWriter(args, request.index()).verdict(request, rows, verdict.node, closing, status);
  Command done;
  rows.call(done);
}

// One cluster a request, or several that share the reading of its rows; then the last of them goes on alone.
__global__ void __launch_bounds__(kThreads, 1) verify_kernel(const __grid_constant__ VerifyParams params) {
  extern __shared__ __align__(16) unsigned char memory[];
  RequestShared& shared = *reinterpret_cast<RequestShared*>(memory);
  const uint32_t size = cluster_size(), rank = cluster_rank();
  const int32_t clusters = params.launch.clusters;  // that share the reading
  const int64_t cluster = blockIdx.x / size, b = cluster / clusters, part = cluster % clusters;
  static_assert(sizeof(VerifyLaunch) % 16 == 0);
  for (uint32_t i = threadIdx.x; i < sizeof(VerifyLaunch) / 16; i += kThreads) {
    reinterpret_cast<uint4*>(&shared.launch)[i] = reinterpret_cast<const uint4*>(&params.launch)[i];
  }
  block_sync();
  const VerifyLaunch& launch = shared.launch;
  const VerifyArgs& args = launch.args;
  Request request(launch, b);
  const Header header = read_header(launch, request);
  if (!header.admitted) {  // the same for all blocks of the request
    if (part == 0 && rank == 0 && threadIdx.x < kWarpSize) VerdictWriter(args, b).none(header.status);
    return;
  }
  const TeamFilters filters{filters_of(args.sampling, header.slot),
                            filters_of(args.draft_sampling, header.slot)};
  const bool reads_laws = request.laws() && filters.target.temperature != 0.0f &&
                          args.draw != Draw::deterministic && header.rule != Rule::target_only &&
                          header.rule != Rule::coupled;
  if (!filters.target.any(request.vocab())) request.use_given_stats();
  Team team(request, filters, shared);
  load_proposal(request, header.drafts, reads_laws, shared);
  // Leaving the leader out of the reading lets it look at the proposal meanwhile.
  const int32_t rows = launch.reads_all_rows ? header.drafts + 1 : 1;
  const uint32_t leaders = static_cast<uint32_t>(clusters);
  const uint32_t warp = (rank + size * (threadIdx.x / kWarpSize)) * leaders + static_cast<uint32_t>(part);
  const uint32_t workers = size * kWarps * leaders - leaders;
  team.plan_wave(0, rows, reads_laws);
  if (team.leads()) {
    look_ahead(request, header, reads_laws, shared);
  } else {
    team.read_wave(warp - leaders, workers);
  }
  if (!is_last_cluster(request.arrivals(), clusters, shared)) return;
  team.make_laws(0, rows, reads_laws);
  cluster_sync();
  if (team.leads()) {
    lead(launch, request, team, filters, header, rows, params.rates, shared);
    return;
  }
  while (team.carry_out()) {
  }
}

struct Plan {
  int64_t nodes, tiles, stats_tiles, lists;
};

Plan plan_of(const VerifyArgs& args) {
  const TensorView& logits = args.target_logits;
  Plan plan{};
  plan.nodes = args.draft_tokens.shape[1] + 1;
  plan.tiles = (logits.shape[logits.rank - 1] + kTile - 1) / kTile;
  plan.stats_tiles = plan.tiles;
  const TensorView& laws = args.draft_logits ? args.draft_logits : args.draft_probs;
  if (laws) plan.stats_tiles = std::max(plan.tiles, (laws.shape[2] + kTile - 1) / kTile);
  plan.lists = std::max<int64_t>(plan.nodes, args.topk_ids ? args.topk_ids.shape[2] : 0);
  return plan;
}

constexpr int64_t kMostForLanes = int64_t{256} << 20;

// Lays the scratch out from `memory` on; returns where it ends.
char* lay_out(const VerifyArgs& args, char* memory, Workspace& workspace) {
  const Plan plan = plan_of(args);
  const int64_t batch = args.draft_tokens.shape[0], rows = batch * (2 * plan.nodes + 1);
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory);
    memory += (count * static_cast<int64_t>(sizeof(*pointer)) + 15) / 16 * 16;
  };
  take(workspace.arrivals, batch);
  take(workspace.edits, batch * plan.lists);
  take(workspace.states, batch * kWarpSize * plan.nodes);
  take(workspace.stats, rows * plan.stats_tiles);
  take(workspace.laws, rows);
  workspace.max_edits = static_cast<int32_t>(plan.lists);
  const int64_t lanes = rows * plan.stats_tiles * kWarpSize;
  if (lanes * 4 <= kMostForLanes) take(workspace.lanes, lanes);
  if (args.draw == Draw::iid_paths && (args.rules || args.rule == Rule::gbv)) {
    const int64_t vocab = args.target_logits.shape[args.target_logits.rank - 1];
    workspace.first_law_stride = (vocab + 4) / 4 * 4;  // room for one more
    take(workspace.rank_keys, batch * 2 * vocab);
    take(workspace.rank_ids, batch * 2 * vocab);
    take(workspace.first_laws, batch * (args.tokens.shape[1] - 1) * workspace.first_law_stride);
  }
  return memory;
}

int64_t room_before_preparation(const VerifyArgs& args, Workspace& workspace, void* memory = nullptr) {
  char* const begin = static_cast<char*>(memory);
  return (lay_out(args, begin, workspace) - begin + 255) / 256 * 256;
}

constexpr int64_t kEagerBytes = int64_t{48} << 20;

// Where all rows are needed anyway, or so few bytes that reading them at once beats going row by row.
bool reads_all_rows(const VerifyArgs& args) {
  const bool walks_up = args.rule == Rule::traversal || args.rule == Rule::gbv ||
                        (args.rule == Rule::automatic && args.draw != Draw::deterministic &&
                         (args.draft_logits || args.draft_probs || args.topk_ids));
  if (walks_up && !args.rules) return true;
  const TensorView& logits = args.target_logits;
  const int64_t rows = args.draft_tokens.shape[0] * (args.draft_tokens.shape[1] + 1);
  return rows * logits.shape[logits.rank - 1] * bytes_of(logits.dtype) <= kEagerBytes;
}

}  // namespace

int64_t verify_workspace(const VerifyArgs& args, Device) {
  Workspace workspace;
  return room_before_preparation(args, workspace) + preparation_of(args).bytes;
}

void verify(const VerifyArgs& args, void* memory, Device device, Stream stream) {
  const int64_t batch = args.draft_tokens.shape[0];
  if (batch == 0) return;
  Workspace scratch;
  const int64_t room = room_before_preparation(args, scratch, memory);
  const ChainScratch of_chains{scratch.stats, scratch.lanes, scratch.laws, scratch.arrivals};
  if (takes_chains(args)) return verify_chains(args, of_chains, device, stream);
  if (takes_drawn_trees(args)) return verify_drawn_trees(args, of_chains, device, stream);
  if (takes_trees(args)) return verify_trees(args, of_chains, device, stream);
  VerifyParams params;
  VerifyLaunch& launch = params.launch;
  launch.args = args;
  launch.workspace = scratch;
  const Preparation what = preparation_of(args);
  if (what.any()) launch.prepared = prepare(args, what, static_cast<char*>(memory) + room, device, stream);
  launch.reads_all_rows = reads_all_rows(args);
  const Plan plan = plan_of(args);
  const ClusterRoom& room_there = room_for<verify_kernel>(sizeof(RequestShared), device);
  const Shape shape = shape_for(room_there, batch, plan.nodes * plan.tiles, launch.reads_all_rows);
  launch.clusters = shape.clusters;
  if (shape.clusters > 1) launch.reads_all_rows = true;
  const int64_t rates = std::min<int64_t>(args.tolerance.num_rates, kMaxNodes);
  std::copy(args.tolerance.rates, args.tolerance.rates + rates, params.rates);
  launch.args.tolerance.num_rates = rates;
  launch_clusters(verify_kernel, batch * shape.clusters, shape.cluster, sizeof(RequestShared), stream,
                  params);
}

}  // namespace foretoken::cuda

// The kernels for chains and trees, and what launches them, on an emulated device; called by
// tests/emulation.py.
#include <string>
#include <vector>

#include "cuda/chain_args.hpp"
#include "cuda/cluster.cuh"
#include "cuda/resident.hpp"
#include "cuda/verify_chain.hpp"

namespace foretoken::cuda {

// Rows with top-p alone take a kernel with a copy engine, which is not emulated: here they go the way they go
// where that kernel does not fit.
bool launch_resident(DType, const ChainArgs&, int64_t, Device, Stream) { return false; }

}  // namespace foretoken::cuda

namespace {

using foretoken::TensorView;

struct Tensor {
  void* data;
  int32_t dtype, rank;
  int64_t shape[foretoken::kMaxRank], strides[foretoken::kMaxRank];
};

struct Law {
  const float* temperature;
  const int32_t* top_k;
  const float *top_p, *min_p;
  const uint64_t* seed;
  int64_t size;
  int32_t weighs, filters;
};

struct Call {
  Tensor target_logits, target_stats, draft_tokens, num_drafts, draft_logits, draft_records, base, slots;
  Tensor parents, draft_row, row_offsets;
  Tensor tokens, num_emitted, num_accepted, path, next_token, next_lengths, status, path_rows;
  Law law;
  int32_t rule, draw;
  int32_t device;       // number of kDevices
  uint32_t impatience;  // one look at the clock in so many finds that long has passed; 0: none
  uint64_t schedule;
};

TensorView view_of(const Tensor& tensor) {
  TensorView view;
  view.data = tensor.data;
  view.dtype = static_cast<foretoken::DType>(tensor.dtype);
  view.rank = tensor.rank;
  std::copy(tensor.shape, tensor.shape + foretoken::kMaxRank, view.shape);
  std::copy(tensor.strides, tensor.strides + foretoken::kMaxRank, view.strides);
  return view;
}

std::string failure;

void verify(const Call& call) {
  using namespace foretoken;
  VerifyArgs args;
  args.target_logits = view_of(call.target_logits);
  args.target_stats = view_of(call.target_stats);
  args.draft_tokens = view_of(call.draft_tokens);
  args.num_drafts = view_of(call.num_drafts);
  args.draft_logits = view_of(call.draft_logits);
  args.draft_records = view_of(call.draft_records);
  args.base = view_of(call.base);
  args.slots = view_of(call.slots);
  args.parents = view_of(call.parents);
  args.draft_row = view_of(call.draft_row);
  args.row_offsets = view_of(call.row_offsets);
  args.tokens = view_of(call.tokens);
  args.num_emitted = view_of(call.num_emitted);
  args.num_accepted = view_of(call.num_accepted);
  args.path = view_of(call.path);
  args.next_token = view_of(call.next_token);
  args.next_lengths = view_of(call.next_lengths);
  args.status = view_of(call.status);
  args.path_rows = view_of(call.path_rows);
  args.rule = static_cast<Rule>(call.rule);
  args.draw = static_cast<Draw>(call.draw);
  args.sampling = {call.law.temperature, call.law.top_k, call.law.top_p, call.law.min_p,
                   call.law.seed,        call.law.size,  nullptr,        call.law.weighs != 0,
                   call.law.filters != 0};
  args.draft_sampling = args.sampling;
  const auto kernel = cuda::takes_chains(args)        ? &cuda::verify_chains
                      : cuda::takes_drawn_trees(args) ? &cuda::verify_drawn_trees
                      : cuda::takes_trees(args)       ? &cuda::verify_trees
                                                      : nullptr;
  if (kernel == nullptr) throw std::runtime_error("not emulated");

  const int64_t batch = args.draft_tokens.shape[0], rows = batch * (2 * args.draft_tokens.shape[1] + 3);
  const int64_t tiles = (args.target_logits.shape[args.target_logits.rank - 1] + kTile - 1) / kTile;
  std::vector<TileStats> stats(static_cast<size_t>(rows * tiles), TileStats{NAN, NAN});
  std::vector<float> lanes(static_cast<size_t>(rows * tiles * 32), NAN);
  std::vector<cuda::ChainRecord> laws(static_cast<size_t>(rows));
  std::vector<uint32_t> arrivals(static_cast<size_t>(batch), 0);
  emulated::seed(call.schedule);
  emulated::set_impatience(call.impatience);
  multiprocessors = kDevices[call.device].multiprocessors;
  kernel(args, {stats.data(), lanes.data(), laws.data(), arrivals.data()}, {DeviceType::cuda, call.device},
         {});
  for (const uint32_t word : arrivals) {
    if (word != 0) throw std::runtime_error("a word in which blocks meet is not left as it was");
  }
}

}  // namespace

// What went wrong; null: nothing.
extern "C" const char* emulated_verify(const Call* call) {
  try {
    verify(*call);
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
  return nullptr;
}

// Blocks of the last launch, and of a cluster of it.
extern "C" void emulated_launch(uint32_t* blocks, uint32_t* cluster) {
  *blocks = emulated::last.blocks;
  *cluster = emulated::last.cluster;
}

#include "cuda/verify_chain.hpp"

#include <algorithm>
#include <type_traits>

#include "cuda/chain.cuh"
#include "cuda/chain_launch.hpp"
#include "cuda/resident.hpp"

namespace foretoken::cuda {

namespace {

template <DType kType>
__global__ void __launch_bounds__(kThreads, 1) verify_chain_kernel(const __grid_constant__ ChainArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  take_turn();
  ChainVerifier<kType>(args, *reinterpret_cast<ChainShared*>(memory)).run();
}

// That are read before anything is decided.
int64_t rows_in(const VerifyArgs& args) {
  const int64_t drafts = args.draft_tokens.shape[1];
  const int64_t rows =
      (args.target_stats ? 0 : drafts + 1) + (args.draft_logits && !args.draft_records ? drafts : 0);
  return std::max<int64_t>(rows, 1);
}

template <int kPasses>
Shape shape_of(const ClusterRoom& room, const ChainArgs& args, int64_t requests, int64_t rows) {
  const int64_t tiles = (args.vocab + kTile - 1) / kTile;
  const bool may_share = args.arrivals != nullptr && !args.prepared;
  const bool reads_laws = args.draft.data != nullptr && args.draft_records == nullptr;
  // Thresholds are found by clusters; blocks that go on together have none.
  const bool filters = args.sampling.filters_rows || (reads_laws && args.draft_sampling.filters_rows);
  return filters || args.lanes == nullptr
             ? kept_shape<find_chain_shape<kPasses, false>>(room, requests, rows, tiles, may_share)
             : kept_shape<find_chain_shape<kPasses, true>>(room, requests, rows, tiles, may_share);
}

// `more`: bytes of shared memory a block behind ChainShared.
void launch_chains(DType dtype, ChainArgs& args, int64_t requests, int64_t rows, size_t more, Device device,
                   Stream stream) {
  const auto launch = [&](auto type) {
    constexpr auto kKernel = verify_chain_kernel<decltype(type)::value>;
    const ClusterRoom& room = room_for<kKernel>(sizeof(ChainShared) + sizeof(RowScratch), device);
    const Shape shape = args.rule == Rule::traversal || args.rule == Rule::automatic
                            ? shape_of<3>(room, args, requests, rows)
                            : shape_of<1>(room, args, requests, rows);
    args.clusters = shape.clusters;
    launch_clusters(kKernel, requests * shape.clusters, shape.cluster, sizeof(ChainShared) + more, stream,
                    args, overlaps<kKernel>(device));
  };
  switch (dtype) {
    case DType::float32: return launch(std::integral_constant<DType, DType::float32>{});
    case DType::bfloat16: return launch(std::integral_constant<DType, DType::bfloat16>{});
    default: return launch(std::integral_constant<DType, DType::float16>{});
  }
}

}  // namespace

bool takes_chains(const VerifyArgs& args) {
  const TensorView &target = args.target_logits, &draft = args.draft_logits;
  const bool alike = !draft || (draft.dtype == target.dtype && draft.shape[2] == target.shape[2] &&
                                draft.shape[1] >= args.draft_tokens.shape[1]);
  const bool rule = args.rule == Rule::rrs || args.rule == Rule::automatic || args.rule == Rule::traversal ||
                    args.rule == Rule::target_only;
  const bool plain = !args.parents && !args.row_offsets && !args.rules && !args.draft_probs &&
                     !args.topk_ids && !args.draft_row && !args.vocab_map && !args.bitmask &&
                     !args.target_constrained && !args.draft_constrained;
  const bool asked = args.path_rows || args.processed.chosen || args.processed.top_tokens ||
                     args.raw.chosen || args.raw.top_tokens;
  return alike && rule && plain && !asked && args.draw != Draw::iid_paths &&
         args.draft_tokens.shape[1] <= kMostChainDrafts &&
         args.tokens.shape[1] == args.draft_tokens.shape[1] + 1;
}

void verify_chains(const VerifyArgs& args, const ChainScratch& scratch, Device device, Stream stream) {
  ChainArgs chain = chain_args_of(args, scratch);
  chain.target = rows_of(args.target_logits);
  const bool reads_laws =
      args.draft_logits && args.draw != Draw::deterministic && args.rule != Rule::target_only;
  const bool handed = reads_laws && args.draft_records;
  if (reads_laws) chain.draft = rows_of(args.draft_logits);
  chain.given = static_cast<const TileStats*>(args.target_stats.data);
  chain.aligned = aligned(args.target_logits) && (!args.draft_logits || aligned(args.draft_logits));
  const DType dtype = args.target_logits.dtype;
  const int64_t requests = args.draft_tokens.shape[0];
  const bool weighs =
      chain.sampling.weighs_rows || (reads_laws && !handed && chain.draft_sampling.weighs_rows);
  // Lists of few elements, which is what other filters take, are made faster in the chains' kernel. It also
  // finds thresholds that come when this has been captured without any.
  ChainArgs laws_wanted = chain;
  if (handed) laws_wanted.draft = {};
  chain.prepared =
      weighs && chain.given == nullptr && launch_resident(dtype, laws_wanted, requests, device, stream);
  if (handed) {
    chain.draft_records = static_cast<const int64_t*>(args.draft_records.data);
    std::copy(args.draft_records.strides, args.draft_records.strides + 3, chain.draft_record_strides);
  }
  launch_chains(dtype, chain, requests, chain.prepared ? 1 : rows_in(args), 0, device, stream);
}

bool takes_rows(const SampleArgs& args) {
  return args.method == SampleMethod::inverse && !args.bitmask && !args.constrained && !args.vocab_map;
}

void sample_rows(const SampleArgs& args, Device device, Stream stream) {
  ChainArgs chain;
  chain.target = {args.logits.data, {args.logits.strides[0], 0}};
  chain.vocab = args.logits.shape[1];
  chain.base = numbers_of(args.base);
  chain.slots = numbers_of(args.slots);
  chain.sampling = chain.draft_sampling = args.sampling;
  chain.tokens = numbers_of(args.tokens);
  chain.status = numbers_of(args.status);
  chain.samples = true;
  chain.purpose = args.purpose;
  chain.step = static_cast<uint32_t>(args.step);
  chain.logprobs = static_cast<float*>(args.logprobs.data);
  chain.logprob_stride = args.logprobs.strides[0];
  chain.records = static_cast<int64_t*>(args.records.data);
  chain.record_strides[0] = args.records.strides[0];
  chain.record_strides[1] = args.records.strides[1];
  chain.aligned = aligned(args.logits);
  const int64_t rows = args.logits.shape[0];
  if (chain.sampling.weighs_rows && launch_resident(args.logits.dtype, chain, rows, device, stream)) return;
  launch_chains(args.logits.dtype, chain, rows, 1, sizeof(RowScratch), device, stream);
}

}  // namespace foretoken::cuda

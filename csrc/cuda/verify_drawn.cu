#include <algorithm>
#include <type_traits>

#include "cuda/chain_launch.hpp"
#include "cuda/drawn.cuh"
#include "cuda/drawn_shape.hpp"

namespace foretoken::cuda {

namespace {

template <DType kType>
__global__ void __launch_bounds__(kThreads, 1) verify_drawn_kernel(const __grid_constant__ ChainArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  take_turn();
  DrawnVerifier<kType>(args, *reinterpret_cast<ChainShared*>(memory)).run();
}

}  // namespace

bool takes_drawn_trees(const VerifyArgs& args) {
  const TensorView &target = args.target_logits, &draft = args.draft_logits;
  const int64_t nodes = args.draft_tokens.shape[1] + 1;
  const bool alike = draft && draft.dtype == target.dtype && draft.shape[2] == target.shape[2] &&
                     draft.shape[1] >= 1 && draft.shape[1] <= nodes && nodes <= kMostTreeNodes;
  const bool rule = args.rule == Rule::rrs || args.rule == Rule::automatic || args.rule == Rule::traversal;
  const bool drawn = args.draw == Draw::iid || args.draw == Draw::without_replacement;
  const bool plain = !args.row_offsets && !args.rules && !args.vocab_map && !args.bitmask &&
                     !args.target_constrained && !args.draft_constrained && !args.sampling.weighs_rows &&
                     (args.draft_records || !args.draft_sampling.weighs_rows);
  const bool asked =
      args.processed.chosen || args.processed.top_tokens || args.raw.chosen || args.raw.top_tokens;
  return alike && rule && plain && !asked && drawn && args.tokens.shape[1] <= kThreads;
}

void verify_drawn_trees(const VerifyArgs& args, const ChainScratch& scratch, Device device, Stream stream) {
  constexpr size_t kShared = sizeof(ChainShared) + sizeof(DrawnTree);
  const int64_t requests = args.draft_tokens.shape[0], nodes = args.draft_tokens.shape[1] + 1;
  ChainArgs tree = chain_args_of(args, scratch);
  tree.target = rows_of(args.target_logits);
  tree.draft = rows_of(args.draft_logits);
  tree.given = static_cast<const TileStats*>(args.target_stats.data);
  tree.aligned = aligned(args.target_logits) && aligned(args.draft_logits);
  tree.law_rows = static_cast<int32_t>(args.draft_logits.shape[1]);
  tree.draft_rows = numbers_of(args.draft_row);
  tree.requests = static_cast<int32_t>(requests);
  tree.without_replacement = args.draw == Draw::without_replacement;
  tree.parents = numbers_of(args.parents);
  tree.most_tokens = static_cast<int32_t>(args.tokens.shape[1]);
  tree.path_rows = numbers_of(args.path_rows);
  tree.draft_records = static_cast<const int64_t*>(args.draft_records.data);
  std::copy(args.draft_records.strides, args.draft_records.strides + 3, tree.draft_record_strides);
  // A law for each inner node, most likely, and no row of a leaf.
  const int64_t rows = std::min<int64_t>(nodes, tree.law_rows) + (args.draft_records ? 0 : tree.law_rows);
  const auto launch = [&](auto type) {
    constexpr auto kKernel = verify_drawn_kernel<decltype(type)::value>;
    const ClusterRoom& room = room_for<kKernel>(kShared, device);
    const DrawnShape shape =
        kept_shape<find_drawn_shape>(room, requests, rows, (tree.vocab + kTile - 1) / kTile, true);
    tree.helpers = shape.helpers;
    tree.own = shape.own;
    launch_clusters(kKernel, requests + shape.helpers, shape.cluster, kShared, stream, tree,
                    overlaps<kKernel>(device));
  };
  switch (args.target_logits.dtype) {
    case DType::float32: return launch(std::integral_constant<DType, DType::float32>{});
    case DType::bfloat16: return launch(std::integral_constant<DType, DType::bfloat16>{});
    default: return launch(std::integral_constant<DType, DType::float16>{});
  }
}

}  // namespace foretoken::cuda

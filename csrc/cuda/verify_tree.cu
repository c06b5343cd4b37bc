#include <type_traits>

#include "cuda/chain_launch.hpp"
#include "cuda/chain_tree.cuh"

namespace foretoken::cuda {

namespace {

template <DType kType>
__global__ void __launch_bounds__(kThreads, 1) verify_tree_kernel(const __grid_constant__ ChainArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  take_turn();
  TreeVerifier<kType>(args, *reinterpret_cast<TreeShared*>(memory)).run();
}

// Whether the walk decides on each node by its own target row alone.
bool walks_down(const VerifyArgs& args) {
  const bool any_law = args.draft_logits || args.draft_probs || args.topk_ids;
  if (args.draw == Draw::iid_paths || args.rules) return false;
  if (args.rule == Rule::target_only) return true;
  return (args.rule == Rule::rrs || args.rule == Rule::automatic) &&
         (args.draw == Draw::deterministic || !any_law);
}

}  // namespace

bool takes_trees(const VerifyArgs& args) {
  const bool edited = args.bitmask || args.target_constrained || args.draft_constrained;
  const bool asked =
      args.processed.chosen || args.processed.top_tokens || args.raw.chosen || args.raw.top_tokens;
  return walks_down(args) && !edited && !asked && !args.target_stats &&
         args.draft_tokens.shape[1] <= kMaxDrafts && args.tokens.shape[1] <= kThreads;
}

void verify_trees(const VerifyArgs& args, const ChainScratch& scratch, Device device, Stream stream) {
  const TensorView& logits = args.target_logits;
  const int64_t requests = args.draft_tokens.shape[0], rows = args.draft_tokens.shape[1] + 1;
  ChainArgs tree = chain_args_of(args, scratch);
  tree.target.data = logits.data;
  tree.target.strides[0] = args.row_offsets ? 0 : logits.strides[0];
  tree.target.strides[1] = logits.strides[logits.rank - 2];
  tree.aligned = aligned(logits);
  tree.parents = numbers_of(args.parents);
  tree.row_offsets = numbers_of(args.row_offsets);
  tree.num_rows = logits.shape[0];
  tree.most_tokens = static_cast<int32_t>(args.tokens.shape[1]);
  tree.path_rows = numbers_of(args.path_rows);
  const auto launch = [&](auto type) {
    constexpr auto kKernel = verify_tree_kernel<decltype(type)::value>;
    const ClusterRoom& room = room_for<kKernel>(sizeof(TreeShared), device);
    const TreeShape found =
        kept_shape<find_tree_shape>(room, requests, rows, (tree.vocab + kTile - 1) / kTile, true);
    tree.clusters = found.shape.clusters;
    tree.first_rows = found.rows;
    launch_clusters(kKernel, requests * found.shape.clusters, found.shape.cluster, sizeof(TreeShared), stream,
                    tree, overlaps<kKernel>(device));
  };
  switch (logits.dtype) {
    case DType::float32: return launch(std::integral_constant<DType, DType::float32>{});
    case DType::bfloat16: return launch(std::integral_constant<DType, DType::bfloat16>{});
    default: return launch(std::integral_constant<DType, DType::float16>{});
  }
}

}  // namespace foretoken::cuda

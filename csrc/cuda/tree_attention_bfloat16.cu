// Tree attention of bfloat16 queries over bfloat16 caches.
#include "cuda/tree_attention_launch.cuh"

namespace foretoken::cuda::attend {

void launch_bfloat16(const LaunchPlan& plan, const Task& task, const Maps& maps, int device,
                     cudaStream_t stream) {
  launch_kind<__nv_bfloat16, false>(plan, task, maps, device, stream);
}

}  // namespace foretoken::cuda::attend

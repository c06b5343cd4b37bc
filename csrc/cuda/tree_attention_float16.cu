// Tree attention of float16 queries over float16 caches.
#include "cuda/tree_attention_launch.cuh"

namespace foretoken::cuda::attend {

void launch_float16(const LaunchPlan& plan, const Task& task, const Maps& maps, int device,
                    cudaStream_t stream) {
  launch_kind<__half, false>(plan, task, maps, device, stream);
}

}  // namespace foretoken::cuda::attend

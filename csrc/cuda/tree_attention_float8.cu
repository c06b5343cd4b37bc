// Tree attention over 8-bit caches, whose elements are halves on their way.
#include "cuda/tree_attention_launch.cuh"

namespace foretoken::cuda::attend {

void launch_float8(const LaunchPlan& plan, const Task& task, const Maps& maps, int device,
                   cudaStream_t stream) {
  launch_kind<__half, true>(plan, task, maps, device, stream);
}

}  // namespace foretoken::cuda::attend

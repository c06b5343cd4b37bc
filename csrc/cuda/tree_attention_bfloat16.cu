// Tree attention of bfloat16 queries over bfloat16 caches.
#include "cuda/tree_attention_launch.cuh"

namespace foretoken::cuda::attend {

void launch_bfloat16(const LaunchPlan& plan, const Task& task, const Maps& maps, int device,
                     cudaStream_t stream) {
  launch_kind<__nv_bfloat16, false>(plan, task, maps, device, stream);
}

bool runs_hopper_code() {
  cudaFuncAttributes attributes{};
  void (*const kernel)(Task, Maps) = tree_attention_kernel<__nv_bfloat16, 128, 1, false>;
  throw_if_failed(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "attributes");
  return attributes.binaryVersion == 90 && attributes.numRegs <= 128;  // two blocks at once
}

}  // namespace foretoken::cuda::attend

#include "cuda/prepare.hpp"

#include "cuda/errors.hpp"
#include "cuda/launch.hpp"
#include "ops/prepare_blocks.hpp"

namespace foretoken::cuda {

namespace {

using preparing::Plan;

__global__ void __launch_bounds__(preparing::kThreads)
    invert_kernel(const __grid_constant__ PrepareArgs args) {
  preparing::invert_map(args, {blockIdx.x, gridDim.x});
}

__global__ void __launch_bounds__(preparing::kThreads, 2)
    edit_kernel(const __grid_constant__ PrepareArgs args, const __grid_constant__ Plan plan) {
  __shared__ preparing::EditScratch scratch;
  preparing::edit_block(args, plan, blockIdx.x, scratch);
}

__global__ void __launch_bounds__(preparing::kThreads)
    scatter_kernel(const __grid_constant__ PrepareArgs args) {
  preparing::scatter(args, {blockIdx.x, gridDim.x});
}

template <class... Args>
void run(void (*kernel)(Args...), int64_t blocks, cudaStream_t stream, const Args&... args) {
  if (blocks == 0) return;
  kernel<<<static_cast<unsigned>(blocks), preparing::kThreads, 0, stream>>>(args...);
  throw_if_failed(cudaGetLastError(), "prepare");
}

PreparedRows prepare_rows(PrepareArgs args, const Preparation& what, void* workspace, Device device,
                          Stream stream) {
  constexpr int64_t kBlocksPerMultiprocessor = 4;
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  const Plan plan = preparing::plan_edits(args, kBlocksPerMultiprocessor * limits_of(device).multiprocessors);
  if (args.inverse != nullptr) {
    static_assert(preparing::kNotThere == -1, "every byte of it is 0xFF");
    const size_t bytes = static_cast<size_t>(args.vocab) * sizeof(int32_t);
    throw_if_failed(cudaMemsetAsync(args.inverse, 0xFF, bytes, handle), "prepare");
    run(invert_kernel, preparing::inverse_blocks(args), handle, args);
  }
  run(edit_kernel, plan.blocks(), handle, args, plan);
  run(scatter_kernel, preparing::scatter_blocks(args), handle, args);
  return preparing::rows_of(what, preparing::places_in(what, workspace));
}

}  // namespace

PreparedRows prepare(const VerifyArgs& args, const Preparation& what, void* workspace, Device device,
                     Stream stream) {
  return prepare_rows(prepare_args(args, what, workspace), what, workspace, device, stream);
}

PreparedRows prepare(const SampleArgs& args, const Preparation& what, void* workspace, Device device,
                     Stream stream) {
  return prepare_rows(prepare_args(args, what, workspace), what, workspace, device, stream);
}

}  // namespace foretoken::cuda

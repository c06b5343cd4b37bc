// ops.merge: a warp for each node and head.
#include <cmath>

#include "cuda/errors.hpp"
#include "cuda/tree_attention.hpp"
#include "cuda/tree_attention_real.cuh"
#include "cuda/views.cuh"

namespace foretoken::cuda {

namespace {

constexpr int kLanes = 32;
constexpr int kRowsPerBlock = 4;

// As cpu/tree_attention.cpp has it.
__global__ void __launch_bounds__(kLanes* kRowsPerBlock)
    merge_kernel(const __grid_constant__ MergeArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kLanes;
  const int64_t nodes = args.out.shape[1], heads = args.out.shape[2];
  if (row >= args.out.shape[0] * nodes * heads) return;
  const int64_t b = row / (nodes * heads), r = row / heads % nodes, head = row % heads;
  const float lse_a = static_cast<const float*>(args.lse_a.data)[offset_of(args.lse_a, b, r, head)];
  const float lse_b = static_cast<const float*>(args.lse_b.data)[offset_of(args.lse_b, b, r, head)];
  const float nothing = -INFINITY;
  const float max = lse_a > lse_b || lse_a != lse_a ? lse_a : lse_b;  // NaN wins
  const float a = max == nothing ? 0.0f : expf(lse_a - max),
              other = max == nothing ? 0.0f : expf(lse_b - max);
  const float sum = a + other;
  const int64_t from_a = offset_of(args.out_a, b, r, head), from_b = offset_of(args.out_b, b, r, head);
  const int64_t to = offset_of(args.out, b, r, head);
  for (int64_t d = threadIdx.x % kLanes; d < args.out.shape[3]; d += kLanes) {
    const float left = a == 0.0f ? 0.0f : attend::read_real(args.out_a, from_a + d) * a;
    const float right = other == 0.0f ? 0.0f : attend::read_real(args.out_b, from_b + d) * other;
    attend::write_real(args.out, to + d, sum == 0.0f ? 0.0f : (left + right) / sum);
  }
  if (threadIdx.x % kLanes == 0) write_float(args.lse, sum == 0.0f ? nothing : max + logf(sum), b, r, head);
}

}  // namespace

void merge(const MergeArgs& args, Stream stream) {
  const int64_t rows = args.out.shape[0] * args.out.shape[1] * args.out.shape[2];
  if (rows == 0) return;
  const auto blocks = static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock);
  merge_kernel<<<blocks, kLanes * kRowsPerBlock, 0, static_cast<cudaStream_t>(stream.handle)>>>(args);
  throw_if_failed(cudaGetLastError(), "launch");
}

}  // namespace foretoken::cuda

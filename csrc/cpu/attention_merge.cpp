#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/attention_kernels.hpp"
#include "cpu/parallel.hpp"
#include "cpu/tree_attention.hpp"
#include "cpu/views.hpp"

namespace foretoken::cpu {

namespace {

char* element(const TensorView& view, int64_t i, int64_t j, int64_t k) {
  return static_cast<char*>(view.data) + offset_of(view, i, j, k) * bytes_of(view.dtype);
}

// The two results of one node and head, and their buffers.
void merge_one(const MergeArgs& args, const AttentionKernels& kernels, int64_t b, int64_t r, int64_t head) {
  const int64_t size = args.out.shape[3], padded = padded_size(size);
  alignas(64) float left[padded_size(kMaxHeadSize)], right[padded_size(kMaxHeadSize)];
  const auto lse_of = [&](const TensorView& lse) {
    return static_cast<double>(static_cast<const float*>(lse.data)[offset_of(lse, b, r, head)]);
  };
  const double lse_a = lse_of(args.lse_a), lse_b = lse_of(args.lse_b);
  const double max = lse_a > lse_b || lse_a != lse_a ? lse_a : lse_b;  // NaN wins
  const bool nothing = max == -std::numeric_limits<double>::infinity();
  const double weight_a = nothing ? 0.0 : std::exp(lse_a - max);
  const double weight_b = nothing ? 0.0 : std::exp(lse_b - max);
  const double sum = nothing ? 1.0 : weight_a + weight_b;
  const auto take = [&](const TensorView& view, double weight, float* values) {
    if (weight == 0.0) {
      std::fill(values, values + padded, 0.0f);
      return;
    }
    kernels.widen(element(view, b, r, head), view.dtype, size, padded, static_cast<float>(weight / sum),
                  values);
  };
  take(args.out_a, weight_a, left);
  take(args.out_b, weight_b, right);
  for (int64_t d = 0; d < size; ++d) left[d] += right[d];
  kernels.narrow(left, size, 1.0f, args.out.dtype, element(args.out, b, r, head));
  const double lse = nothing ? max : max + std::log(sum);
  write_float(args.lse, static_cast<float>(lse), b, r, head);
}

}  // namespace

void merge(const MergeArgs& args) {
  const int64_t nodes = args.out.shape[1], heads = args.out.shape[2];
  const AttentionKernels& kernels = attention_kernels(args.out_a.dtype, DType::float32);
  parallel_for(args.out.shape[0] * nodes, heads * args.out.shape[3], [&](int64_t item) {
    for (int64_t head = 0; head < heads; ++head) merge_one(args, kernels, item / nodes, item % nodes, head);
  });
}

}  // namespace foretoken::cpu

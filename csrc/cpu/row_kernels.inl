// Included once per instruction set, with FORETOKEN_KERNELS naming the path. No intrinsics: loops of fixed
// length over plain arrays, which the compiler turns into whatever the flags of this file allow.
#include "cpu/row_kernels.hpp"
#include "math/half.hpp"

namespace foretoken::cpu {
namespace {

constexpr int kQuarter = kTile / 4;

void load(const void* row, DType dtype, int64_t first, int64_t count, float pad, float* tile) {
  if (dtype == DType::float32) {
    std::memcpy(tile, static_cast<const float*>(row) + first, static_cast<size_t>(count) * sizeof(float));
  } else if (dtype == DType::bfloat16) {
    const uint16_t* source = static_cast<const uint16_t*>(row) + first;
    for (int64_t i = 0; i < count; ++i) tile[i] = float_of_bfloat(source[i]);
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(row) + first;
    for (int64_t i = 0; i < count; ++i) tile[i] = float_of_half(source[i]);
  }
  for (int64_t i = count; i < kTile; ++i) tile[i] = pad;
}

TileExtremes extremes(const float* tile, float* group_max) {
  float high[kQuarter], low[kQuarter];
  uint32_t nan[kQuarter];
  for (int k = 0; k < kQuarter; ++k) {
    high[k] = -__builtin_inff();
    low[k] = __builtin_inff();
    nan[k] = 0;
  }
  for (int quarter = 0; quarter < 4; ++quarter) {
    const float* x = tile + quarter * kQuarter;
    for (int k = 0; k < kQuarter; ++k) {
      high[k] = x[k] > high[k] ? x[k] : high[k];
      low[k] = x[k] < low[k] ? x[k] : low[k];
      nan[k] |= x[k] != x[k] ? 1u : 0u;
    }
  }
  for (int width = kQuarter / 2; width >= 1; width /= 2) {
    if (width == kGroups / 2) {
      for (int k = 0; k < kGroups; ++k) group_max[k] = high[k];
    }
    for (int k = 0; k < width; ++k) {
      high[k] = high[k + width] > high[k] ? high[k + width] : high[k];
      low[k] = low[k + width] < low[k] ? low[k + width] : low[k];
      nan[k] |= nan[k + width];
    }
  }
  return {high[0], low[0], nan[0] != 0};
}

// The pinned order. `value(e)` is element e of the tile; a CUDA warp that loads eight neighbours per thread
// performs the same tree with three folds in registers and five shuffles.
template <class Value>
float sum_tile(Value value) {
  float sum[kQuarter];
  for (int k = 0; k < kQuarter; ++k) {
    sum[k] = (value(k) + value(k + kQuarter)) + (value(k + 2 * kQuarter) + value(k + 3 * kQuarter));
  }
  float folded[kQuarter / 2];
  for (int k = 0; k < kQuarter / 2; ++k) folded[k] = sum[2 * k] + sum[2 * k + 1];
  for (int k = 0; k < kQuarter / 4; ++k) sum[k] = folded[2 * k] + folded[2 * k + 1];
  for (int k = 0; k < kQuarter / 8; ++k) folded[k] = sum[2 * k] + sum[2 * k + 1];
  for (int width = kQuarter / 16; width >= 1; width /= 2) {
    for (int k = 0; k < width; ++k) folded[k] += folded[k + width];
  }
  return folded[0];
}

float sum_weights(const float* tile, float anchor, float scale, float cut) {
  return sum_tile([=](int e) { return weight_of_logit(tile[e], anchor, scale, cut); });
}

float sum_probs(const float* tile, float cut) {
  return sum_tile([=](int e) { return tile[e] >= cut ? tile[e] : 0.0f; });
}

float positive(float value) { return value > 0.0f ? value : 0.0f; }

float sum_residual(const float* target, const RowLaw& target_law, const float* draft, const RowLaw& draft_law,
                   float gain) {
  const float max = target_law.max, scale = target_law.scale, cut = target_law.cut;
  const float draft_max = draft_law.max, draft_scale = draft_law.scale, draft_cut = draft_law.cut;
  if (draft_law.kind == LawKind::probs) {
    return sum_tile([=](int e) {
      const float weight = weight_of_logit(target[e], max, scale, cut);
      return positive(fused(-gain, weight_of_prob(draft[e], draft_scale, draft_cut), weight));
    });
  }
  return sum_tile([=](int e) {
    const float weight = weight_of_logit(target[e], max, scale, cut);
    return positive(fused(-gain, weight_of_logit(draft[e], draft_max, draft_scale, draft_cut), weight));
  });
}

template <class Weight>
uint64_t fill_masses(uint64_t* masses, Weight weight) {
  uint64_t total = 0;
  for (int e = 0; e < kTile; ++e) masses[e] = mass_of(weight(e));
  for (int e = 0; e < kTile; ++e) total += masses[e];
  return total;
}

uint64_t masses(const float* target, const RowLaw& target_law, const float* draft, const RowLaw& draft_law,
                float gain, uint64_t* out) {
  const float max = target_law.max, scale = target_law.scale, cut = target_law.cut;
  const float draft_max = draft_law.max, draft_scale = draft_law.scale, draft_cut = draft_law.cut;
  if (draft == nullptr) {
    return fill_masses(out, [=](int e) { return weight_of_logit(target[e], max, scale, cut); });
  }
  if (draft_law.kind == LawKind::probs) {
    return fill_masses(out, [=](int e) {
      const float weight = weight_of_logit(target[e], max, scale, cut);
      return positive(fused(-gain, weight_of_prob(draft[e], draft_scale, draft_cut), weight));
    });
  }
  return fill_masses(out, [=](int e) {
    const float weight = weight_of_logit(target[e], max, scale, cut);
    return positive(fused(-gain, weight_of_logit(draft[e], draft_max, draft_scale, draft_cut), weight));
  });
}

}  // namespace

extern const RowKernels FORETOKEN_KERNELS;
const RowKernels FORETOKEN_KERNELS = {FORETOKEN_KERNELS_NAME, load,  extremes, sum_weights, sum_probs,
                                      sum_residual,           masses};

}  // namespace foretoken::cpu

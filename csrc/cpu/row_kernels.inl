// Included once per instruction set, behind a header that defines Floats and its operations, with
// FORETOKEN_KERNELS naming the path. Nothing here knows how wide a vector is.
#include "cpu/row_kernels.hpp"

namespace foretoken::cpu {
namespace {

constexpr int kQuarter = kTile / 4;
constexpr int kLanes = Floats::kLanes;

void load(const void* row, DType dtype, int64_t first, int64_t count, float pad, float* tile) {
  int64_t i = 0;
  if (dtype == DType::float32) {
    std::memcpy(tile, static_cast<const float*>(row) + first, static_cast<size_t>(count) * sizeof(float));
    i = count;
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(row) + first;
    const bool half = dtype == DType::float16;
    for (; i + kLanes <= count; i += kLanes) {
      (half ? load_half(source + i) : load_bfloat(source + i)).store(tile + i);
    }
    for (; i < count; ++i) tile[i] = half ? float_of_half(source[i]) : float_of_bfloat(source[i]);
  }
  for (; i < kTile; ++i) tile[i] = pad;
}

TileMax max_of(const float* tile) {
  Floats high[4];
  NanSeen nan[2];
  for (int c = 0; c < 4; ++c) high[c] = Floats::all(-__builtin_inff());
  for (int e = 0; e < kTile; e += 4 * kLanes) {
    Floats x[4];
    for (int c = 0; c < 4; ++c) x[c] = Floats::load(tile + e + c * kLanes);
    for (int c = 0; c < 4; ++c) high[c] = greater_of(x[c], high[c]);
    nan[0].add(x[0], x[1]);
    nan[1].add(x[2], x[3]);
  }
  float lane[kLanes];
  greater_of(greater_of(high[0], high[1]), greater_of(high[2], high[3])).store(lane);
  float max = lane[0];
  for (int i = 1; i < kLanes; ++i) max = lane[i] > max ? lane[i] : max;
  return {max, nan[0].any() || nan[1].any()};
}

TileExtremes extremes(const float* tile) {
  Floats low = Floats::all(__builtin_inff());
  for (int e = 0; e < kTile; e += kLanes) low = lesser_of(Floats::load(tile + e), low);
  float lane[kLanes];
  low.store(lane);
  float min = lane[0];
  for (int i = 1; i < kLanes; ++i) min = lane[i] < min ? lane[i] : min;
  const TileMax high = max_of(tile);
  return {high.max, min, high.has_nan};
}

void group_max(const float* tile, float* groups) {
  constexpr int kMembers = kTile / kGroups;
  for (int group = 0; group < kGroups; ++group) {
    Floats high = Floats::load(tile + group * kMembers);
    for (int e = kLanes; e < kMembers; e += kLanes) {
      high = greater_of(Floats::load(tile + group * kMembers + e), high);
    }
    float lane[kLanes];
    high.store(lane);
    float max = lane[0];
    for (int i = 1; i < kLanes; ++i) max = lane[i] > max ? lane[i] : max;
    groups[group] = max;
  }
}

// The pinned order. `value(e)` holds elements e .. e + lanes of the tile; a CUDA warp that loads eight
// neighbours per thread performs the same tree with three folds in registers and five shuffles.
template <int kFolds, class Value>
inline __attribute__((always_inline)) Floats fold_neighbours(const Value& value, int k) {
  if constexpr (kFolds == 0) {
    const Floats first = add(value(k), value(k + kQuarter));
    return add(first, add(value(k + 2 * kQuarter), value(k + 3 * kQuarter)));
  } else {
    constexpr int kStep = kLanes << (kFolds - 1);
    const Floats low = fold_neighbours<kFolds - 1>(value, k);
    return add_neighbours(low, fold_neighbours<kFolds - 1>(value, k + kStep));
  }
}

template <class Value>
inline float sum_tile(const Value& value) {
  constexpr int kVectors = kQuarter / 8 / kLanes;
  Floats sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = fold_neighbours<3>(value, v * 8 * kLanes);
  for (int width = kVectors / 2; width >= 1; width /= 2) {
    for (int v = 0; v < width; ++v) sum[v] = add(sum[v], sum[v + width]);
  }
  return add_halves(sum[0]);
}

// exp2_scaled of math/exp_log.hpp and weight_of_logit of math/row_law.hpp, lane by lane.
struct LogitWeights {
  Floats max, scale, cut;
  LogitWeights(float max_, float scale_, float cut_)
      : max(Floats::all(max_)), scale(Floats::all(scale_)), cut(Floats::all(cut_)) {}

  inline Floats operator()(Floats x) const {
    const Floats round = Floats::all(12582912.0f);
    const Floats distance = subtract(x, max);
    const Floats shifted = multiply_add(distance, scale, round);
    const Floats fraction = multiply_add(distance, scale, subtract(round, shifted));
    Floats power = Floats::all(0x1.5bba14p-10f);
    power = multiply_add(power, fraction, Floats::all(0x1.3cea88p-7f));
    power = multiply_add(power, fraction, Floats::all(0x1.c6b752p-5f));
    power = multiply_add(power, fraction, Floats::all(0x1.ebf9bcp-3f));
    power = multiply_add(power, fraction, Floats::all(0x1.62e42ap-1f));
    power = multiply_add(power, fraction, Floats::all(1.0f));
    return scale_unless_below(x, cut, power, shifted);
  }
};

struct ProbWeights {
  Floats scale, cut;
  ProbWeights(float scale_, float cut_) : scale(Floats::all(scale_)), cut(Floats::all(cut_)) {}
  inline Floats operator()(Floats x) const { return unless_below(x, cut, multiply(x, scale)); }
};

float sum_weights(const float* tile, float anchor, float scale, float cut) {
  const LogitWeights weights(anchor, scale, cut);
  return sum_tile([&](int e) { return weights(Floats::load(tile + e)); });
}

float sum_probs(const float* tile, float cut) {
  const Floats bound = Floats::all(cut);
  return sum_tile([&](int e) {
    const Floats x = Floats::load(tile + e);
    return unless_below(x, bound, x);
  });
}

// Calls body with the weight of the residual's elements, whatever kind of law the draft has.
template <class Body>
inline auto with_residual(const float* target, const RowLaw& target_law, const float* draft,
                          const RowLaw& draft_law, float gain, Body body) {
  const LogitWeights of_target(target_law.max, target_law.scale, target_law.cut);
  const Floats minus_gain = Floats::all(-gain), zero = Floats::all(0.0f);
  if (draft == nullptr) return body([&](int e) { return of_target(Floats::load(target + e)); });
  if (draft_law.kind == LawKind::probs) {
    const ProbWeights of_draft(draft_law.scale, draft_law.cut);
    return body([&](int e) {
      const Floats weight = of_target(Floats::load(target + e));
      return greater_of(multiply_add(minus_gain, of_draft(Floats::load(draft + e)), weight), zero);
    });
  }
  const LogitWeights of_draft(draft_law.max, draft_law.scale, draft_law.cut);
  return body([&](int e) {
    const Floats weight = of_target(Floats::load(target + e));
    return greater_of(multiply_add(minus_gain, of_draft(Floats::load(draft + e)), weight), zero);
  });
}

float sum_residual(const float* target, const RowLaw& target_law, const float* draft, const RowLaw& draft_law,
                   float gain) {
  return with_residual(target, target_law, draft, draft_law, gain,
                       [](auto weight) { return sum_tile(weight); });
}

uint64_t sum_masses(const float* target, const RowLaw& target_law, const float* draft,
                    const RowLaw& draft_law, float gain) {
  return with_residual(target, target_law, draft, draft_law, gain, [](auto weight) {
    MassSum sum;
    for (int e = 0; e < kTile; e += kLanes) sum.add(weight(e));
    return sum.total();
  });
}

void masses(const float* target, const RowLaw& target_law, const float* draft, const RowLaw& draft_law,
            float gain, uint64_t* out) {
  with_residual(target, target_law, draft, draft_law, gain, [=](auto weight) {
    for (int e = 0; e < kTile; e += kLanes) store_masses(weight(e), out + e);
  });
}

int64_t at_least(const float* tile, float bound, float* out) {
  int64_t kept = 0;
  for (int e = 0; e < kTile; e += kLanes) kept += keep_at_least(Floats::load(tile + e), bound, out + kept);
  return kept;
}

}  // namespace

extern const RowKernels FORETOKEN_KERNELS;
const RowKernels FORETOKEN_KERNELS = {
    FORETOKEN_KERNELS_NAME, load,       max_of, extremes, group_max, sum_weights, sum_probs,
    sum_residual,           sum_masses, masses, at_least};

}  // namespace foretoken::cpu

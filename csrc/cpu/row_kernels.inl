// Included once per instruction set, behind a header that defines Floats and its operations, with
// FORETOKEN_KERNELS naming the path. Nothing here knows how wide a vector is.
#include "cpu/row_kernels.hpp"

namespace foretoken::cpu {
namespace {

// What the loops consist of has to become part of them: a call keeps its vectors in memory.
#define FORETOKEN_HOT inline __attribute__((always_inline))
#define FORETOKEN_HOT_LAMBDA __attribute__((always_inline))
#if defined(__FP_FAST_FMAF)
#define FORETOKEN_HOT_WEIGHT FORETOKEN_HOT
#else  // every multiply-add is a call itself: one copy of them will do
#define FORETOKEN_HOT_WEIGHT __attribute__((noinline))
#endif

constexpr int kQuarter = kTile / 4;
constexpr int kLanes = Floats::kLanes;
constexpr int kPair = 2 * kLanes;
constexpr float kInfinity = __builtin_inff();

// How elements lie in memory. A pair of vectors holds the next kPair elements, in whichever arrangement is
// the cheapest to unpack; `fold` adds neighbours, and its result is in their order whatever the arrangement.
struct Float32Elements {
  using Type = float;
  static constexpr bool kSumShowsNan = kScalingKeepsNan;
  static Floats neighbours(const float* p) { return Floats::load(p); }
  static void pair(const float* p, Floats& a, Floats& b) {
    a = Floats::load(p);
    b = Floats::load(p + kLanes);
  }
  static Floats fold(Floats a, Floats b) { return add_neighbours(a, b); }
};

struct Bfloat16Elements {
  using Type = uint16_t;
  static constexpr bool kSumShowsNan = true;  // its payload has no low bits to reach the exponent with
  static constexpr uint16_t kInfinityBits = 0x7F80;
  static float value(uint16_t bits) { return float_of_bfloat(bits); }
  static Floats neighbours(const uint16_t* p) { return load_bfloat(p); }
  static void pair(const uint16_t* p, Floats& a, Floats& b) { load_bfloat_pairs(p, a, b); }
  static Floats fold(Floats a, Floats b) { return add(a, b); }
};

struct Float16Elements {
  using Type = uint16_t;
  static constexpr bool kSumShowsNan = true;
  static constexpr uint16_t kInfinityBits = 0x7C00;
  static float value(uint16_t bits) { return float_of_half(bits); }
  static Floats neighbours(const uint16_t* p) { return load_half(p); }
  static void pair(const uint16_t* p, Floats& a, Floats& b) {
    a = load_half(p);
    b = load_half(p + kLanes);
  }
  static Floats fold(Floats a, Floats b) { return add_neighbours(a, b); }
};

template <class Body>
inline auto with_elements(DType dtype, Body body) {
  if (dtype == DType::bfloat16) return body(Bfloat16Elements{});
  if (dtype == DType::float16) return body(Float16Elements{});
  return body(Float32Elements{});
}

template <class Elements>
inline const typename Elements::Type* elements_of(TileRef tile) {
  return static_cast<const typename Elements::Type*>(tile.elements);
}

// The machine fetches ahead within a page, and a float32 tile is one: the tiles behind this one are asked for
// here, kPair elements at a time, while there is work to do on the tile itself.
template <int kTilesAhead, int kLevel, class Type>
FORETOKEN_HOT void fetch_ahead(const Type* tile, int e) {
  constexpr uintptr_t kLine = 64;
  const uintptr_t from =
      reinterpret_cast<uintptr_t>(tile) + static_cast<uintptr_t>(kTilesAhead * kTile + e) * sizeof(Type);
  for (uintptr_t at = 0; at < kPair * sizeof(Type); at += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + at), 0, kLevel);
  }
}

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

TileMax max_of(TileRef ref) {
  return with_elements(ref.dtype, [=](auto elements) -> TileMax {
    using Elements = decltype(elements);
    const auto* tile = elements_of<Elements>(ref);
    Floats high[4];
    NanSeen nan[2];
    for (int c = 0; c < 4; ++c) high[c] = Floats::all(-kInfinity);
    for (int e = 0; e < kTile; e += 2 * kPair) {
      Floats x[4];
      Elements::pair(tile + e, x[0], x[1]);
      Elements::pair(tile + e + kPair, x[2], x[3]);
      for (int c = 0; c < 4; ++c) high[c] = greater_of(x[c], high[c]);
      nan[0].add(x[0], x[1]);
      nan[1].add(x[2], x[3]);
      fetch_ahead<1, 3>(tile, e);
      fetch_ahead<1, 3>(tile, e + kPair);
    }
    const float max = largest_lane(greater_of(greater_of(high[0], high[1]), greater_of(high[2], high[3])));
    return {max, nan[0].any() || nan[1].any()};
  });
}

// Which elements make a group is nobody's business.
void group_max(TileRef ref, float* groups) {
  static_assert(kGroups == 16 && kGroups % kLanes == 0);
  with_elements(ref.dtype, [=](auto elements) {
    using Elements = decltype(elements);
    constexpr int kVectors = kGroups / kLanes, kChains = 4;
    const auto* tile = elements_of<Elements>(ref);
    Floats high[kChains * kVectors];
    for (Floats& vector : high) vector = Floats::all(-kInfinity);
    for (int e = 0; e < kTile; e += kChains * kGroups) {
      for (int v = 0; v < kChains * kVectors; v += 2) {
        Floats a, b;
        Elements::pair(tile + e + v * kLanes, a, b);
        high[v] = greater_of(a, high[v]);
        high[v + 1] = greater_of(b, high[v + 1]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      for (int c = 1; c < kChains; ++c) high[v] = greater_of(high[v + c * kVectors], high[v]);
      high[v].store(groups + v * kLanes);
    }
  });
}

template <int kCount, class Body>
FORETOKEN_HOT void unrolled(const Body& body) {
  if constexpr (kCount > 0) {
    unrolled<kCount - 1>(body);
    body(kCount - 1);
  }
}

// The pinned order. `value(e, place, a, b)` gives elements e .. e + kPair of the tile; `place` runs through
// the tile from its start to its end meanwhile. A CUDA warp that loads eight neighbours per thread performs
// the same tree with three folds in registers and five shuffles.
template <class Elements, bool kUnrolled, class Value>
FORETOKEN_HOT float sum_tile(const Value& value) {
  constexpr int kFolded = kQuarter / kPair;
  Floats sum[kFolded];
  const auto fold = [&](int i) FORETOKEN_HOT_LAMBDA {
    Floats a[4], b[4];
    for (int quarter = 0; quarter < 4; ++quarter) {
      value(i * kPair + quarter * kQuarter, (4 * i + quarter) * kPair, a[quarter], b[quarter]);
    }
    sum[i] = Elements::fold(add(add(a[0], a[1]), add(a[2], a[3])), add(add(b[0], b[1]), add(b[2], b[3])));
  };
  if constexpr (kUnrolled) {
    unrolled<kFolded>(fold);
  } else {
    for (int i = 0; i < kFolded; ++i) fold(i);
  }
  for (int i = 0; i < kFolded / 2; ++i) sum[i] = add_neighbours(sum[2 * i], sum[2 * i + 1]);
  for (int i = 0; i < kFolded / 4; ++i) sum[i] = add_neighbours(sum[2 * i], sum[2 * i + 1]);
  for (int width = kFolded / 8; width >= 1; width /= 2) {
    for (int i = 0; i < width; ++i) sum[i] = add(sum[i], sum[i + width]);
  }
  return add_halves(sum[0]);
}

// exp2_scaled of math/exp_log.hpp and weight_of_logit of math/row_law.hpp, lane by lane; times 2^44 for
// masses: a power of two on every coefficient, which changes no bit but the exponent's.
template <bool kMasses>
struct LogitWeights {
  Floats max, scale, cut;
  LogitWeights(float max_, float scale_, float cut_)
      : max(Floats::all(max_)), scale(Floats::all(scale_)), cut(Floats::all(cut_)) {}

  FORETOKEN_HOT_WEIGHT Floats operator()(Floats x) const {
    constexpr float kUnit = kMasses ? static_cast<float>(kMassUnit) : 1.0f;
    const Floats round = Floats::all(12582912.0f);
    const Floats distance = subtract(x, max);
    const Floats shifted = multiply_add(distance, scale, round);
    const Floats whole = subtract(shifted, round);
    const Floats fraction = multiply_subtract(distance, scale, whole);
    Floats power = Floats::all(0x1.5bba14p-10f * kUnit);
    power = multiply_add(power, fraction, Floats::all(0x1.3cea88p-7f * kUnit));
    power = multiply_add(power, fraction, Floats::all(0x1.c6b752p-5f * kUnit));
    power = multiply_add(power, fraction, Floats::all(0x1.ebf9bcp-3f * kUnit));
    power = multiply_add(power, fraction, Floats::all(0x1.62e42ap-1f * kUnit));
    power = multiply_add(power, fraction, Floats::all(kUnit));
    return scale_unless_below(x, cut, power, shifted, whole);
  }
};

template <bool kMasses>
struct ProbWeights {
  Floats scale, cut;
  ProbWeights(float scale_, float cut_) : scale(Floats::all(scale_)), cut(Floats::all(cut_)) {}
  FORETOKEN_HOT Floats operator()(Floats x) const {
    const Floats weight = unless_below(x, cut, multiply(x, scale));
    return kMasses ? multiply(weight, Floats::all(static_cast<float>(kMassUnit))) : weight;
  }
};

// The largest element of a tile, pair by pair.
template <class Elements>
class Anchor;

template <>
class Anchor<Float32Elements> {
 public:
  void add(const float* pair) {
    const Floats a = Floats::load(pair), b = Floats::load(pair + kLanes);
    high_[0] = greater_of(a, high_[0]);
    high_[1] = greater_of(b, high_[1]);
    if constexpr (!Float32Elements::kSumShowsNan) nan_.add(a, b);
  }
  TileMax of(const float*) const { return {largest_lane(greater_of(high_[0], high_[1])), nan_.any()}; }

 private:
  Floats high_[2] = {Floats::all(-kInfinity), Floats::all(-kInfinity)};
  NanSeen nan_;
};

template <class Elements>
class Anchor {
 public:
  void add(const uint16_t* pair) {
    static_assert(Patterns::kLanes == kPair);
    greatest_ = greater_signed(greatest_, Patterns::load(pair));
  }
  TileMax of(const uint16_t* tile) const {
    const uint16_t bits = greatest_signed(greatest_);
    if (bits < 0x8000) return {Elements::value(bits), bits > Elements::kInfinityBits};
    Patterns least = Patterns::load(tile);  // all negative: the largest is the one of the smallest pattern
    for (int e = kPair; e < kTile; e += kPair) least = lesser_unsigned(least, Patterns::load(tile + e));
    return {Elements::value(least_unsigned(least)), false};
  }

 private:
  Patterns greatest_ = Patterns::all(0x8000);
};

template <class Elements, class Meanwhile>
FORETOKEN_HOT float sum_weights_of(const typename Elements::Type* tile, float anchor, float scale, float cut,
                                   const Meanwhile& meanwhile) {
  const LogitWeights<false> weights(anchor, scale, cut);
  return sum_tile<Elements, kUnrollLaws>([&](int e, int place, Floats& a, Floats& b) FORETOKEN_HOT_LAMBDA {
    meanwhile(place);
    Elements::pair(tile + e, a, b);
    a = weights(a);
    b = weights(b);
  });
}

// The largest element of a tile is found while the tile before it is summed: it would otherwise be waited
// for.
template <class Elements>
inline void summarise(const typename Elements::Type* tile, int64_t count, float scale, LogitsTile* out) {
  Anchor<Elements> first;
  for (int e = 0; e < kTile; e += kPair) first.add(tile + e);
  TileMax high = first.of(tile);
  for (int64_t index = 0; index < count; ++index, tile += kTile) {
    const auto* next = index + 1 < count ? tile + kTile : tile;
    Anchor<Elements> coming;
    const float anchor = high.max > -kInfinity ? high.max : 0.0f;  // nothing but -infinity has no weight
    const float sum = sum_weights_of<Elements>(tile, anchor, scale, logits_floor(anchor, scale),
                                               [&](int e) FORETOKEN_HOT_LAMBDA {
                                                 fetch_ahead<3, 2>(tile, e);
                                                 coming.add(next + e);
                                               });
    out[index] = {high.max, sum, !high.has_nan && high.max < kInfinity && sum < kInfinity};
    high = coming.of(next);
  }
}

void summarise_logits(TileRef first, int64_t count, float scale, LogitsTile* out) {
  with_elements(first.dtype, [=](auto elements) {
    using Elements = decltype(elements);
    summarise<Elements>(elements_of<Elements>(first), count, scale, out);
  });
}

float sum_weights(TileRef ref, float anchor, float scale, float cut) {
  return with_elements(ref.dtype, [=](auto elements) {
    using Elements = decltype(elements);
    const auto* tile = elements_of<Elements>(ref);
    const LogitWeights<false> weights(anchor, scale, cut);
    return sum_tile<Elements, false>([&](int e, int place, Floats& a, Floats& b) FORETOKEN_HOT_LAMBDA {
      fetch_ahead<1, 3>(tile, place);
      Elements::pair(tile + e, a, b);
      const bool any =
          any_at_least(greater_of(a, b), cut);  // mostly not: what is asked for here is a few tokens
      a = any ? weights(a) : Floats::all(0.0f);
      b = any ? weights(b) : Floats::all(0.0f);
    });
  });
}

void summarise_probs(TileRef first, int64_t count, float cut, ProbsTile* out) {
  with_elements(first.dtype, [=](auto elements) {
    using Elements = decltype(elements);
    for (int64_t index = 0; index < count; ++index) {
      const auto* tile = elements_of<Elements>(first) + index * kTile;
      const TileMax high = max_of({tile, first.dtype});
      const Floats bound = Floats::all(cut);
      Floats low = Floats::all(kInfinity);
      const float sum = sum_tile<Elements, false>([&](int e, int, Floats& a, Floats& b) FORETOKEN_HOT_LAMBDA {
        Elements::pair(tile + e, a, b);
        low = lesser_of(a, lesser_of(b, low));
        a = unless_below(a, bound, a);
        b = unless_below(b, bound, b);
      });
      float lane[kLanes];
      low.store(lane);
      float min = lane[0];
      for (int i = 1; i < kLanes; ++i) min = lane[i] < min ? lane[i] : min;
      out[index] = {high.max, min, sum, high.has_nan};
    }
  });
}

// Calls body with what gives the residual's weights (times 2^44 if they are to be masses) at an element of
// the tiles, pair by pair, whatever kind of law the draft has.
template <class Elements, bool kMasses, class Body>
FORETOKEN_HOT auto with_residual(TileRef target_ref, const RowLaw& target_law, TileRef draft_ref,
                                 const RowLaw& draft_law, float gain, Body body) {
  const LogitWeights<kMasses> of_target(target_law.max, target_law.scale, target_law.cut);
  const auto *target = elements_of<Elements>(target_ref), *draft = elements_of<Elements>(draft_ref);
  const auto target_alone = [&](int e, int place, Floats& a, Floats& b) FORETOKEN_HOT_LAMBDA {
    fetch_ahead<1, 3>(target, place);
    Elements::pair(target + e, a, b);
    a = of_target(a);
    b = of_target(b);
  };
  if (draft == nullptr) return body(target_alone);
  const Floats minus_gain = Floats::all(-gain), zero = Floats::all(0.0f);
  const auto with_draft = [&](const auto& of_draft) FORETOKEN_HOT_LAMBDA {
    return body([&](int e, int place, Floats& a, Floats& b) FORETOKEN_HOT_LAMBDA {
      target_alone(e, place, a, b);
      fetch_ahead<1, 3>(draft, place);
      Floats c, d;
      Elements::pair(draft + e, c, d);
      a = greater_of(multiply_add(minus_gain, of_draft(c), a), zero);
      b = greater_of(multiply_add(minus_gain, of_draft(d), b), zero);
    });
  };
  if (draft_law.kind == LawKind::probs) {
    return with_draft(ProbWeights<kMasses>(draft_law.scale, draft_law.cut));
  }
  // A law that was recorded may not be that of the row beside it, and then has no weight for what is larger
  // than its largest element.
  const LogitWeights<kMasses> of_logit(draft_law.max, draft_law.scale, draft_law.cut);
  return with_draft([&](Floats x) FORETOKEN_HOT_LAMBDA { return of_logit(lesser_of(x, of_logit.max)); });
}

float sum_residual(TileRef target, const RowLaw& target_law, TileRef draft, const RowLaw& draft_law,
                   float gain) {
  return with_elements(target.dtype, [&](auto elements) {
    using Elements = decltype(elements);
    return with_residual<Elements, false>(
        target, target_law, draft, draft_law, gain,
        [](const auto& weight) FORETOKEN_HOT_LAMBDA { return sum_tile<Elements, false>(weight); });
  });
}

uint64_t sum_masses(TileRef target, const RowLaw& target_law, TileRef draft, const RowLaw& draft_law,
                    float gain) {
  return with_elements(target.dtype, [&](auto elements) {
    using Elements = decltype(elements);
    return with_residual<Elements, true>(target, target_law, draft, draft_law, gain,
                                         [](const auto& weight) FORETOKEN_HOT_LAMBDA {
                                           MassSum sum;
                                           for (int e = 0; e < kTile; e += kPair) {
                                             Floats a, b;
                                             weight(e, e, a, b);
                                             sum.add(a);
                                             sum.add(b);
                                           }
                                           return sum.total();
                                         });
  });
}

// The tile as float32, whose pairs are neighbours.
TileRef in_order(TileRef tile, float* buffer) {
  if (tile.dtype == DType::float32 || tile.elements == nullptr) return tile;
  with_elements(tile.dtype, [=](auto elements) {
    using Elements = decltype(elements);
    for (int e = 0; e < kTile; e += kLanes)
      Elements::neighbours(elements_of<Elements>(tile) + e).store(buffer + e);
  });
  return {buffer, DType::float32};
}

void masses(TileRef target, const RowLaw& target_law, TileRef draft, const RowLaw& draft_law, float gain,
            uint64_t* out) {
  float target_buffer[kTile], draft_buffer[kTile];
  target = in_order(target, target_buffer);
  draft = in_order(draft, draft_buffer);
  with_residual<Float32Elements, true>(target, target_law, draft, draft_law, gain,
                                       [=](const auto& weight) FORETOKEN_HOT_LAMBDA {
                                         for (int e = 0; e < kTile; e += kPair) {
                                           Floats a, b;
                                           weight(e, e, a, b);
                                           store_masses(a, out + e);
                                           store_masses(b, out + e + kLanes);
                                         }
                                       });
}

int64_t between(TileRef ref, float low, float high, float* out) {
  return with_elements(ref.dtype, [=](auto elements) {
    using Elements = decltype(elements);
    const auto* tile = elements_of<Elements>(ref);
    int64_t kept = 0;
    for (int e = 0; e < kTile; e += 2 * kPair) {
      Floats x[4];
      Elements::pair(tile + e, x[0], x[1]);
      Elements::pair(tile + e + kPair, x[2], x[3]);
      fetch_ahead<1, 3>(tile, e);
      fetch_ahead<1, 3>(tile, e + kPair);
      const Floats most = greater_of(greater_of(x[0], x[1]), greater_of(x[2], x[3]));
      if (!any_at_least(most, low)) continue;  // nearly always, as few elements are looked for
      for (const Floats& vector : x) kept += keep_between(vector, low, high, out + kept);
    }
    return kept;
  });
}

float plain_read(const float* elements, int64_t count) {
  constexpr int kVectors = 8;
  Floats high[kVectors];
  for (Floats& vector : high) vector = Floats::all(-kInfinity);
  int64_t i = 0;
  for (; i + kVectors * kLanes <= count; i += kVectors * kLanes) {
    for (int c = 0; c < kVectors; ++c) high[c] = greater_of(Floats::load(elements + i + c * kLanes), high[c]);
    for (int c = 0; c < kVectors; c += 2) fetch_ahead<1, 3>(elements + i, c * kLanes);
  }
  for (int c = 1; c < kVectors; ++c) high[0] = greater_of(high[c], high[0]);
  float largest = largest_lane(high[0]);
  for (; i < count; ++i) largest = elements[i] > largest ? elements[i] : largest;
  return largest;
}

}  // namespace

extern const RowKernels FORETOKEN_KERNELS;
const RowKernels FORETOKEN_KERNELS = {
    FORETOKEN_KERNELS_NAME, load,       max_of, group_max, summarise_logits, summarise_probs, sum_weights,
    sum_residual,           sum_masses, masses, between,   plain_read};

#undef FORETOKEN_HOT
#undef FORETOKEN_HOT_LAMBDA
#undef FORETOKEN_HOT_WEIGHT

}  // namespace foretoken::cpu

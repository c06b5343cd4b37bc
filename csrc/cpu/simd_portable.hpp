// The few vector operations the row kernels need, as plain loops. The x86 twins are in csrc/cpu/x86.
#pragma once

#include "math/half.hpp"
#include "math/row_law.hpp"

namespace foretoken::cpu {
namespace {

// Whether scale_unless_below hands on a NaN whatever its payload.
constexpr bool kScalingKeepsNan = false;
// Whether a row's first pass gains from having no loop within a tile: if registers are many and tiles few
// vectors.
constexpr bool kUnrollLaws = false;

struct Floats {
  static constexpr int kLanes = 8;
  float lane[kLanes];

  template <class Value>
  static inline __attribute__((always_inline)) Floats from(Value value) {
    Floats result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = value(i);
    return result;
  }

  static Floats load(const float* p) {
    return from([=](int i) { return p[i]; });
  }
  static Floats all(float value) {
    return from([=](int) { return value; });
  }
  void store(float* p) const { std::memcpy(p, lane, sizeof lane); }
};

inline Floats add(Floats a, Floats b) {
  return Floats::from([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Floats subtract(Floats a, Floats b) {
  return Floats::from([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Floats multiply(Floats a, Floats b) {
  return Floats::from([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return Floats::from([&](int i) { return fused(a.lane[i], b.lane[i], c.lane[i]); });
}
inline Floats multiply_subtract(Floats a, Floats b, Floats c) {
  return Floats::from([&](int i) { return fused(a.lane[i], b.lane[i], -c.lane[i]); });
}
// a where it is greater, else b: a NaN in a is passed over.
inline Floats greater_of(Floats a, Floats b) {
  return Floats::from([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats lesser_of(Floats a, Floats b) {
  return Floats::from([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// value, or 0 where x < bound; not where x is NaN.
inline Floats unless_below(Floats x, Floats bound, Floats value) {
  return Floats::from([&](int i) { return x.lane[i] < bound.lane[i] ? 0.0f : value.lane[i]; });
}
// power * 2^whole, 0 where x < bound. `whole` is a whole number, which adding 1.5 * 2^23 left in the low bits
// of `shifted` too; each path uses the one that is cheaper there.
inline Floats scale_unless_below(Floats x, Floats bound, Floats power, Floats shifted, Floats) {
  return Floats::from([&](int i) {
    const float scaled = float_of(bits_of(power.lane[i]) + (bits_of(shifted.lane[i]) << 23));
    return x.lane[i] < bound.lane[i] ? 0.0f : scaled;
  });
}
// {a0 + a1, a2 + a3, ..., b0 + b1, ...}
inline Floats add_neighbours(Floats a, Floats b) {
  constexpr int half = Floats::kLanes / 2;
  return Floats::from([&](int i) {
    return i < half ? a.lane[2 * i] + a.lane[2 * i + 1] : b.lane[2 * (i - half)] + b.lane[2 * (i - half) + 1];
  });
}
// Adds the upper half to the lower until one element is left.
inline float add_halves(Floats a) {
  for (int width = Floats::kLanes / 2; width >= 1; width /= 2) {
    for (int i = 0; i < width; ++i) a.lane[i] += a.lane[i + width];
  }
  return a.lane[0];
}
struct NanSeen {
  uint32_t lane[Floats::kLanes] = {};
  void add(Floats a, Floats b) {
    for (int i = 0; i < Floats::kLanes; ++i) {
      lane[i] |= (a.lane[i] != a.lane[i] ? 1u : 0u) | (b.lane[i] != b.lane[i] ? 1u : 0u);
    }
  }
  bool any() const {
    uint32_t found = 0;
    for (uint32_t value : lane) found |= value;
    return found != 0;
  }
};
// A weight times kMassUnit, as a whole number: exactly mass_of.
inline uint64_t whole_mass(float mass) {
  return bits_of(static_cast<double>(mass) + 4503599627370496.0) & 0x000FFFFFFFFFFFFFull;
}
inline void store_masses(Floats masses, uint64_t* out) {
  for (int i = 0; i < Floats::kLanes; ++i) out[i] = whole_mass(masses.lane[i]);
}

// Sums of masses, of weights that were multiplied by kMassUnit already.
struct MassSum {
  uint64_t lane[Floats::kLanes] = {};
  void add(Floats masses) {
    for (int i = 0; i < Floats::kLanes; ++i) lane[i] += whole_mass(masses.lane[i]);
  }
  uint64_t total() const {
    uint64_t sum = 0;
    for (uint64_t value : lane) sum += value;
    return sum;
  }
};

inline float largest_lane(Floats a) {
  float largest = a.lane[0];
  for (int i = 1; i < Floats::kLanes; ++i) largest = a.lane[i] > largest ? a.lane[i] : largest;
  return largest;
}

inline Floats load_bfloat(const uint16_t* p) {
  return Floats::from([=](int i) { return float_of_bfloat(p[i]); });
}
// The elements at even and at odd places of the next 2 * kLanes: cheaper to unpack than neighbours.
inline void load_bfloat_pairs(const uint16_t* p, Floats& even, Floats& odd) {
  even = Floats::from([=](int i) { return float_of_bfloat(p[2 * i]); });
  odd = Floats::from([=](int i) { return float_of_bfloat(p[2 * i + 1]); });
}
inline Floats load_half(const uint16_t* p) {
  return Floats::from([=](int i) { return float_of_half(p[i]); });
}
inline bool any_at_least(Floats x, float bound) {
  int found = 0;
  for (float value : x.lane) found |= value >= bound ? 1 : 0;
  return found != 0;
}
// Appends the lanes in [low, high); writes up to kLanes elements at out, returns how many count.
inline int keep_between(Floats x, float low, float high, float* out) {
  int kept = 0;
  for (float value : x.lane) {
    out[kept] = value;
    kept += value >= low && value < high ? 1 : 0;
  }
  return kept;
}

// Sixteen-bit patterns of floating-point numbers: as signed integers the positive ones are in order, as
// unsigned ones the negative ones in reverse.
struct Patterns {
  static constexpr int kLanes = 16;
  uint16_t lane[kLanes];

  static Patterns load(const uint16_t* p) {
    Patterns result;
    std::memcpy(result.lane, p, sizeof result.lane);
    return result;
  }
  static Patterns all(uint16_t bits) {
    Patterns result;
    for (uint16_t& lane : result.lane) lane = bits;
    return result;
  }
};
inline Patterns greater_signed(Patterns a, Patterns b) {
  for (int i = 0; i < Patterns::kLanes; ++i) {
    const int16_t x = static_cast<int16_t>(a.lane[i]), y = static_cast<int16_t>(b.lane[i]);
    a.lane[i] = static_cast<uint16_t>(x > y ? x : y);
  }
  return a;
}
inline Patterns lesser_unsigned(Patterns a, Patterns b) {
  for (int i = 0; i < Patterns::kLanes; ++i) a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
inline uint16_t greatest_signed(Patterns a) {
  int16_t greatest = static_cast<int16_t>(a.lane[0]);
  for (uint16_t lane : a.lane)
    greatest = static_cast<int16_t>(lane) > greatest ? static_cast<int16_t>(lane) : greatest;
  return static_cast<uint16_t>(greatest);
}
inline uint16_t least_unsigned(Patterns a) {
  uint16_t least = a.lane[0];
  for (uint16_t lane : a.lane) least = lane < least ? lane : least;
  return least;
}

}  // namespace
}  // namespace foretoken::cpu

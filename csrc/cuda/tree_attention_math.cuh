// A warpgroup's 64 queries against a tile: scores, weights, weighted values; and partial results made one.
//
// Each warp has 16 of the rows; in a lane, register 4 j + e is element (lane / 4 + 8 (e / 2),
// 8 j + 2 (lane % 4) + e % 2) of the warp's rows. Warpgroup products have the same registers in the same
// places, so that only the two products differ between architectures.
#pragma once

#include "cuda/tree_attention_load.cuh"

namespace foretoken::cuda::attend {

__device__ inline float minus_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }

// A lane's two rows of a partial result: maxima of scores times log2 e, sums of weights. Until finish(), the
// sums are of the lane's own columns.
struct Rows {
  float max[2], sum[2];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      max[i] = minus_infinity();
      sum[i] = 0.0f;
    }
  }
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
    }
  }
};

// A lane's part of the weighted values, as products leave it.
template <int kD>
struct Values {
  static constexpr int kWide = kD == 64 ? 32 : 64;  // of one product
  static constexpr int kBlocks = kD / 2 / kWide;
  static constexpr int kQuads = kD / 8;  // groups of four: two columns of both rows

  float blocks[kBlocks][kWide];

  __device__ float* quad(int number) { return &blocks[4 * number / kWide][4 * number % kWide]; }
};

// How the left and the right of two partial results of a row are scaled to be added. A side that has seen
// nothing leaves the other one as it is.
struct Scales {
  float left, right;

  __device__ Scales(float left_max, float right_max, float& max) {
    max = fmaxf(left_max, right_max);
    const float reference = max == minus_infinity() ? 0.0f : max;
    left = exp2_fast(left_max - reference);
    right = exp2_fast(right_max - reference);
  }
  __device__ float sum(float a, float b) const { return __fmaf_rn(b, right, a * left); }
};

// Values at rest: groups of four, each group of all threads of a warpgroup side by side. A thread reads what
// it has written itself.
template <bool kShared>
class Resting {
 public:
  __device__ explicit Resting(float4* values) : values_(values) {}

  __device__ float4 get(int quad) const {
    float4 value;
    if constexpr (kShared) {
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                   : "r"(shared_address(values_ + quad * kTeam)));
    } else {
      asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                   : "l"(__cvta_generic_to_global(values_ + quad * kTeam)));
    }
    return value;
  }
  __device__ void put(int quad, const float* from) const {
    if constexpr (kShared) {
      asm volatile("st.shared.v4.f32 [%4], {%0, %1, %2, %3};" ::"f"(from[0]), "f"(from[1]), "f"(from[2]),
                   "f"(from[3]), "r"(shared_address(values_ + quad * kTeam)));
    } else {
      asm volatile("st.global.v4.f32 [%4], {%0, %1, %2, %3};" ::"f"(from[0]), "f"(from[1]), "f"(from[2]),
                   "f"(from[3]), "l"(__cvta_generic_to_global(values_ + quad * kTeam)));
    }
  }

 private:
  float4* const values_;
};

// Merges with the left of two partial results, which is at rest. Groups are asked for some at a time, as
// memory is far away and registers are few.
template <int kD, bool kShared>
__device__ void put_behind(Values<kD>& right, Rows& rows, const Resting<kShared>& left,
                           const Rows& left_rows) {
  const Scales first(left_rows.max[0], rows.max[0], rows.max[0]);
  const Scales second(left_rows.max[1], rows.max[1], rows.max[1]);
  rows.sum[0] = first.sum(left_rows.sum[0], rows.sum[0]);
  rows.sum[1] = second.sum(left_rows.sum[1], rows.sum[1]);
  constexpr int kAhead = kShared ? 4 : 16;
#pragma unroll
  for (int begin = 0; begin < Values<kD>::kQuads; begin += kAhead) {
    float4 values[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) values[i] = left.get(begin + i);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float* const quad = right.quad(begin + i);
      quad[0] = first.sum(values[i].x, quad[0]);
      quad[1] = first.sum(values[i].y, quad[1]);
      quad[2] = second.sum(values[i].z, quad[2]);
      quad[3] = second.sum(values[i].w, quad[3]);
    }
  }
}

template <int kD, bool kShared>
__device__ void put_down(Values<kD>& values, const Resting<kShared>& to) {
#pragma unroll
  for (int i = 0; i < Values<kD>::kQuads; ++i) to.put(i, values.quad(i));
}

// Whether threads keep the queries: the products of Hopper take them from registers, which leaves shared
// memory to the ring, and a third more of what it can hand out. Wider heads have no registers left.
constexpr bool keeps_queries(int head_size, bool hopper) { return hopper && head_size == 128; }

// The products of one warpgroup. Between begin() and commit() they are given to the matrix units, which may
// be at work until wait().
template <class Element, int kD>
class Products {
 public:
  using Sums = Values<kD>;

  // 64 queries: in shared memory, or each thread has what it gives to the products, columns 16 k to 16 k + 15
  // in four registers: of its first row, of its second, and the same eight columns on.
  static constexpr bool kKeepsQueries = keeps_queries(kD, kHasWarpgroups);
  struct Queries {
    uint32_t matrix;
    uint32_t kept[kKeepsQueries ? kD / 16 : 1][4];
  };

  // 64 queries by 64 keys.
  static __device__ void add_scores(float (&scores)[32], const Queries& queries, uint32_t keys) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const Matrix a(queries.matrix, 16), b(keys, 16);
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      const auto at = static_cast<uint32_t>(k / 4 * kBlockBytes + k % 4 * 32);
      if constexpr (kKeepsQueries) {
        multiply_rows<Element>(scores, queries.kept[k], b.at(at), k > 0);
      } else {
        multiply_rows<Element>(scores, a.at(at), b.at(at), k > 0);
      }
    }
#else
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x % kTeam / 32);
#pragma unroll
    for (int i = 0; i < 32; ++i) scores[i] = 0.0f;
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      uint32_t a[4], b[4];
      load_matrices(a, queries.matrix + place_of(warp * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < kTile; n += 16) {
        load_matrices(b, keys + place_of(n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
        multiply_16x8<Element>(scores + n / 2, a, b[0], b[1]);
        multiply_16x8<Element>(scores + n / 2 + 4, a, b[2], b[3]);
      }
    }
#endif
  }

  // Adds 64 x 64 weights by 64 values.
  static __device__ void add_values(Sums& sums, const uint32_t (&weights)[16], uint32_t values, bool first) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const Matrix b(values, kBlockBytes);
#pragma unroll
    for (int block = 0; block < Sums::kBlocks; ++block) {
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) {
        const auto at = static_cast<uint32_t>(2 * block * kBlockBytes + k * 16 * 128);
        multiply_weights<Element>(sums.blocks[block], weights + 4 * k, b.at(at), k > 0 || !first);
      }
    }
#else
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (first) {
#pragma unroll
      for (int quad = 0; quad < kD / 8; ++quad) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.quad(quad)[i] = 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
#pragma unroll
      for (int piece = 0; piece < kD / 8; piece += 2) {
        uint32_t b[4];
        load_transposed(b, values + place_of(16 * k + lane % 16, piece + lane / 16));
        multiply_16x8<Element>(sums.quad(piece), weights + 4 * k, b[0], b[1]);
        multiply_16x8<Element>(sums.quad(piece + 1), weights + 4 * k, b[2], b[3]);
      }
    }
#endif
  }

  static __device__ void begin() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    products_begin();
#endif
  }
  static __device__ void commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    products_commit();
#endif
  }

  // Until all products but those of the latest `kPending` commits are done.
  template <int kPending>
  static __device__ void wait() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    products_wait<kPending>();
#endif
  }

  static __device__ void settle(float (&scores)[32]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    keep_in_place(scores);
#endif
  }
  static __device__ void settle(Sums& sums) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#pragma unroll
    for (int block = 0; block < Sums::kBlocks; ++block) keep_in_place(sums.blocks[block]);
#endif
  }

 private:
  static constexpr int kBlockBytes = kTile * 128;  // 64 columns of a tile
};

// What turns products into scores times log2 e.
struct ScoreScale {
  float factor;          // of the products
  float cap, cap_scale;  // 0: none
  bool plain;            // nothing but a positive factor

  __device__ ScoreScale(float scale, float softcap) {
    constexpr float kLog2E = 1.4426950408889634f;
    cap = softcap * kLog2E;
    cap_scale = softcap > 0.0f ? 2.0f * kLog2E * scale / softcap : 0.0f;
    factor = softcap > 0.0f ? 1.0f : scale * kLog2E;
    plain = softcap <= 0.0f && factor > 0.0f;
  }

  // tanh(x) = 1 - 2 / (exp(2 x) + 1)
  __device__ float capped(float product) const {
    return cap - 2.0f * cap * reciprocal_fast(exp2_fast(product * cap_scale) + 1.0f);
  }
};

// Takes the slots of a tile that a lane's rows do not see, by bits, out of its scores' products.
__device__ inline void hide(float (&scores)[32], uint64_t first_sees, uint64_t second_sees) {
  const int shift = 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const uint64_t seen = (row == 0 ? first_sees : second_sees) >> shift;
    const uint32_t halves[2] = {static_cast<uint32_t>(seen), static_cast<uint32_t>(seen >> 32)};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if ((halves[j / 4] >> (8 * (j % 4) + i) & 1u) == 0) scores[4 * j + 2 * row + i] = minus_infinity();
      }
    }
  }
}

// Products become scores where that is more than a factor. What is hidden is hidden afterwards.
__device__ inline float scores_of(float (&products)[32], const ScoreScale& scale) {
  if (scale.plain) return scale.factor;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    // The largest product is not the largest score if the factor is negative.
    products[i] = scale.cap > 0.0f ? scale.capped(products[i]) : products[i] * scale.factor;
  }
  return 1.0f;
}

// Scores, but for a positive factor, become weights. What was summed before is to be scaled by `factors`.
// Both rows go side by side, so that what depends on each other is not all that a warp has to do.
__device__ inline void weigh(float (&scores)[32], float factor, Rows& rows, float (&factors)[2]) {
  float high[2], low[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    high[row] = fmaxf(scores[2 * row], scores[2 * row + 1]);
    low[row] = fmaxf(scores[4 + 2 * row], scores[4 + 2 * row + 1]);
  }
#pragma unroll
  for (int j = 2; j < 8; j += 2) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      high[row] = fmaxf(high[row], fmaxf(scores[4 * j + 2 * row], scores[4 * j + 2 * row + 1]));
      low[row] = fmaxf(low[row], fmaxf(scores[4 * j + 4 + 2 * row], scores[4 * j + 4 + 2 * row + 1]));
    }
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) high[row] = fmaxf(high[row], low[row]);
#pragma unroll
  for (int reach = 1; reach < 4; reach *= 2) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      high[row] = fmaxf(high[row], __shfl_xor_sync(0xffffffffu, high[row], reach));
    }
  }
  float reference[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    // A reference a little below the largest score does as well and need not be changed so often.
    constexpr float kSlack = 8.0f;
    const float highest = high[row] * factor;
    const float max = highest > rows.max[row] + kSlack ? highest : rows.max[row];
    reference[row] = max == minus_infinity() ? 0.0f : max;
    factors[row] = exp2_fast(rows.max[row] - reference[row]);
    rows.max[row] = max;
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) scores[i] = exp2_fast(__fmaf_rn(scores[i], factor, -reference[i / 2 % 2]));
}

// Adds a tile's weights. Done where exponentials have been waited for: among them, each sum would wait for
// one.
__device__ inline void add_weights(const float (&weights)[32], const float (&factors)[2], Rows& rows) {
  float sums[2][2] = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i / 2][i % 2] += weights[4 * j + i];
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    rows.sum[row] = __fmaf_rn(rows.sum[row], factors[row], sums[row][0] + sums[row][1]);
  }
}

template <class Element>
__device__ inline void pack_weights(const float (&scores)[32], uint32_t (&weights)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) weights[i] = pack<Element>(scores[2 * i], scores[2 * i + 1]);
}

// Factors are exactly 1 where no maximum has changed.
template <int kD>
__device__ inline void scale_values(Values<kD>& values, const float (&factors)[2]) {
  if (!__any_sync(0xffffffffu, factors[0] != 1.0f || factors[1] != 1.0f)) return;
#pragma unroll
  for (int quad = 0; quad < Values<kD>::kQuads; ++quad) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values.quad(quad)[i] *= factors[i / 2];
  }
}

}  // namespace foretoken::cuda::attend

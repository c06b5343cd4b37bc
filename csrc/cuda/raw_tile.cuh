// A tile of 1024 neighbours as it lies in memory, unpacked where it is used: half the registers of a LaneTile
// for 16-bit elements, and their extremes two at a time. Lanes hold what those of a LaneTile hold.
#pragma once

#include <cuda_fp16.h>

#include "cuda/tile.cuh"
#include "math/draft_tree.hpp"

namespace foretoken::cuda {

template <DType kType>
struct RawTile {
  static constexpr bool kPacked = kType != DType::float32;
  static constexpr int kWords = kPacked ? 16 : 32;
  uint32_t word[kWords];

  // Element i of the lane, as LaneTile::element_of numbers them.
  __device__ float operator[](int i) const {
    if constexpr (kType == DType::float32) return __uint_as_float(word[i]);
    const uint32_t pair = word[i / 2];
    if constexpr (kType == DType::bfloat16) {
      return __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xFFFF0000u);
    }
    const uint32_t bits = i % 2 == 0 ? pair : pair >> 16;
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
};

template <DType kType>
__device__ inline uint32_t bits_at(const DeviceRow& row, int64_t element) {
  if constexpr (kType == DType::float32) {
    return element < row.size ? static_cast<const uint32_t*>(row.data)[element] : 0xFF800000u;
  }
  constexpr uint32_t kMinusInfinity = kType == DType::bfloat16 ? 0xFF80u : 0xFC00u;
  return element < row.size ? static_cast<const uint16_t*>(row.data)[element] : kMinusInfinity;
}

// Behind the row's end lies -infinity. 16 bytes at a time where the row's address allows it.
template <DType kType>
__device__ inline void load_raw(const DeviceRow& row, int64_t index, RawTile<kType>& tile) {
  constexpr int kBytes = RawTile<kType>::kPacked ? 2 : 4;
  constexpr int kLoads = RawTile<kType>::kWords / 4, kOfQuarter = kLoads / 4;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const char* base = static_cast<const char*>(row.data) + index * kTile * kBytes;
  if ((index + 1) * kTile <= row.size && reinterpret_cast<uintptr_t>(base) % 16 == 0) {
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int quarter = load / kOfQuarter, part = load % kOfQuarter;
      const char* at = base + (quarter * 256 + lane * 8) * kBytes + part * 16;
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(at));
      tile.word[4 * load] = words.x;
      tile.word[4 * load + 1] = words.y;
      tile.word[4 * load + 2] = words.z;
      tile.word[4 * load + 3] = words.w;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const uint32_t bits = bits_at<kType>(row, index * kTile + LaneTile::element_of(i));
    if constexpr (kType == DType::float32) {
      tile.word[i] = bits;
    } else {
      tile.word[i / 2] = i % 2 == 0 ? bits : tile.word[i / 2] | bits << 16;
    }
  }
}

// Of one pair of 16-bit elements, or of one float32: NaN if either is.
template <DType kType>
__device__ inline uint32_t greater_or_nan(uint32_t a, uint32_t b) {
  uint32_t greater;
  if constexpr (kType == DType::float32) {
    float of;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(of) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
    greater = __float_as_uint(of);
  } else if constexpr (kType == DType::bfloat16) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(greater) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(greater) : "r"(a), "r"(b));
  }
  return greater;
}

// A NaN may be passed over: it has been seen on the way to the maximum.
template <DType kType>
__device__ inline uint32_t lesser(uint32_t a, uint32_t b) {
  uint32_t less;
  if constexpr (kType == DType::float32) {
    less = __float_as_uint(fminf(__uint_as_float(a), __uint_as_float(b)));
  } else if constexpr (kType == DType::bfloat16) {
    asm("min.bf16x2 %0, %1, %2;" : "=r"(less) : "r"(a), "r"(b));
  } else {
    asm("min.f16x2 %0, %1, %2;" : "=r"(less) : "r"(a), "r"(b));
  }
  return less;
}

struct LaneExtremes {
  float max;  // NaN if there is one
  float min;
};

template <DType kType>
__device__ inline LaneExtremes extremes_of(const RawTile<kType>& tile) {
  RawTile<kType> high, low;
  high.word[0] = low.word[0] = tile.word[0];
#pragma unroll
  for (int i = 1; i < RawTile<kType>::kWords; ++i) {
    high.word[0] = greater_or_nan<kType>(high.word[0], tile.word[i]);
    low.word[0] = lesser<kType>(low.word[0], tile.word[i]);
  }
  if constexpr (!RawTile<kType>::kPacked) return {high[0], low[0]};
  const float max = high[0] >= high[1] ? high[0] : high[1];  // the second if either is NaN ...
  return {high[0] == high[0] ? max : high[0], fminf(low[0], low[1])};
}

// The largest of what the lanes hold, in every lane; a positive NaN is larger than anything.
__device__ inline float warp_max(float mine) {
  const uint32_t bits = __float_as_uint(mine);
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  const uint32_t high = __reduce_max_sync(kAllLanes, key);
  return __uint_as_float(high & 0x80000000u ? high & 0x7FFFFFFFu : ~high);
}

// In the order of sum_of_tile.
template <DType kType, class Weight>
__device__ inline float sum_of_raw(const RawTile<kType>& tile, Weight weight) {
  float v[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    v[j] = (weight(tile[j]) + weight(tile[8 + j])) + (weight(tile[16 + j]) + weight(tile[24 + j]));
  }
  float sum = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

}  // namespace foretoken::cuda

// A tile of 1024 neighbours in the registers of a warp, and its sums in the pinned order of docs/numerics.md:
// lane l holds elements 8l .. 8l + 7 of each quarter.
#pragma once

#include <cuda_runtime.h>

#include "math/half.hpp"
#include "math/row_law.hpp"
#include "ops/tensor_view.hpp"

namespace foretoken::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct DeviceRow {
  const void* data;
  int64_t size;
};

struct LaneTile {
  float x[32];  // quarter q, neighbour j at 8q + j

  static __device__ int64_t element_of(int i) {
    return (i / 8) * 256 + static_cast<int64_t>(threadIdx.x % 32) * 8 + i % 8;
  }
};

template <DType kType>
__device__ inline float element_at(const DeviceRow& row, int64_t index) {
  if constexpr (kType == DType::float32) return static_cast<const float*>(row.data)[index];
  const uint32_t bits = static_cast<const uint16_t*>(row.data)[index];
  return kType == DType::bfloat16 ? float_of_bfloat(bits) : float_of_half(bits);
}

template <DType kType>
__device__ inline void unpack(const uint4& words, float* out) {
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == DType::float32) {
      out[i] = __uint_as_float(word[i]);
    } else if constexpr (kType == DType::bfloat16) {
      out[2 * i] = __uint_as_float(word[i] << 16);
      out[2 * i + 1] = __uint_as_float(word[i] & 0xFFFF0000u);
    } else {
      out[2 * i] = float_of_half(word[i] & 0xFFFFu);
      out[2 * i + 1] = float_of_half(word[i] >> 16);
    }
  }
}

// What lies behind the row's end is `pad`. 16 bytes at a time where the row's address allows it.
template <DType kType>
__device__ inline void load_tile(const DeviceRow& row, int64_t index, float pad, LaneTile& tile) {
  constexpr int kBytes = kType == DType::float32 ? 4 : 2;
  const char* base = static_cast<const char*>(row.data) + index * kTile * kBytes;
  const bool whole = (index + 1) * kTile <= row.size && reinterpret_cast<uintptr_t>(base) % 16 == 0;
  if (whole) {
    constexpr int kLoads = kBytes * 8 / 16;
    uint4 words[4 * kLoads];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int part = 0; part < kLoads; ++part) {
        const char* at = base + (q * 256 + static_cast<int>(threadIdx.x % 32) * 8) * kBytes + part * 16;
        words[q * kLoads + part] = __ldg(reinterpret_cast<const uint4*>(at));
      }
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int part = 0; part < kLoads; ++part) {
        unpack<kType>(words[q * kLoads + part], tile.x + q * 8 + part * (16 / kBytes));
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int64_t element = index * kTile + LaneTile::element_of(i);
    tile.x[i] = element < row.size ? element_at<kType>(row, element) : pad;
  }
}

struct WarpMax {
  float max;  // NaN passed over
  bool has_nan;
};

__device__ inline WarpMax max_of_tile(const LaneTile& tile) {
  float high = -__int_as_float(0x7F800000);
  bool nan = false;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    high = fmaxf(high, tile.x[i]);  // IEEE maximum: a NaN loses
    nan |= tile.x[i] != tile.x[i];
  }
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, step));
  return {high, __any_sync(kAllLanes, nan) != 0};
}

// Quarters, then neighbours three times, then halves five times. The same value in every lane.
template <class Weight>
__device__ inline float sum_of_tile(const LaneTile& tile, Weight weight) {
  float v[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    v[j] = (weight(tile.x[j]) + weight(tile.x[8 + j])) + (weight(tile.x[16 + j]) + weight(tile.x[24 + j]));
  }
  float sum = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

// Integers: any order will do.
template <class Mass>
__device__ inline uint64_t mass_sum_of_tile(const LaneTile& tile, Mass mass) {
  uint64_t sum = 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) sum += mass(tile.x[i]);
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

// The element in whose interval `left` falls, counted from element 0; `left` is below the tile's mass.
template <class Mass>
__device__ inline int find_in_tile(const LaneTile& tile, Mass mass, uint64_t left) {
  int found = -1;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    uint64_t mine = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) mine += mass(tile.x[8 * q + j]);
    uint64_t end = mine;  // of this lane's eight, counted from the start of the quarter
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint64_t lower = __shfl_up_sync(kAllLanes, end, step);
      if (static_cast<int>(threadIdx.x % 32) >= step) end += lower;
    }
    uint64_t at = end - mine;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint64_t next = at + mass(tile.x[8 * q + j]);
      if (left >= at && left < next) found = q * 256 + static_cast<int>(threadIdx.x % 32) * 8 + j;
      at = next;
    }
    // Behind the quarter that holds it, what is left has wrapped and lies above every sum to come.
    left -= __shfl_sync(kAllLanes, end, 31);
  }
  const unsigned owner = __ballot_sync(kAllLanes, found >= 0);
  return __shfl_sync(kAllLanes, found, __ffs(static_cast<int>(owner)) - 1);
}

}  // namespace foretoken::cuda

// A tile of 1024 neighbours in the registers of a warp, and its sums in the pinned order of docs/numerics.md:
// lane l holds elements 8l .. 8l + 7 of each quarter.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "math/half.hpp"
#include "math/row_law.hpp"
#include "ops/tensor_view.hpp"

namespace foretoken::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kWarpSize = 32;

struct DeviceRow {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t size = 0;
};

__device__ inline float infinity() { return __int_as_float(0x7F800000); }
__device__ inline int lane_id() { return static_cast<int>(threadIdx.x % kWarpSize); }

// Order-preserving: larger floats have larger keys.
__device__ inline uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// Of numbers without NaN; in one instruction, where floats would take five exchanges.
__device__ inline float max_of_warp(float value) {
  return value_of(__reduce_max_sync(kAllLanes, key_of(value)));
}

template <class T>
__device__ inline T sum_of_warp(T value) {
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Of this lane and those before it.
template <class T>
__device__ inline T sum_up_to_lane(T value) {
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const T lower = __shfl_up_sync(kAllLanes, value, step);
    if (lane_id() >= step) value += lower;
  }
  return value;
}

__device__ inline float element_at(const DeviceRow& row, int64_t index) {
  if (row.dtype == DType::float32) return static_cast<const float*>(row.data)[index];
  const uint32_t bits = static_cast<const uint16_t*>(row.data)[index];
  return row.dtype == DType::bfloat16 ? float_of_bfloat(bits) : float_of_half(bits);
}

struct LaneTile {
  float x[32];  // quarter q, neighbour j at 8q + j

  static __device__ int32_t element_of(int i) { return (i / 8) * 256 + lane_id() * 8 + i % 8; }
};

__device__ inline int64_t tiles_of(int64_t size) { return (size + kTile - 1) / kTile; }

// Whether a tile lies in the row as a whole, where it can be read 16 bytes at a time.
__device__ inline bool reads_whole(const DeviceRow& row, int64_t index) {
  return (index + 1) * kTile <= row.size && reinterpret_cast<uintptr_t>(row.data) % 16 == 0;
}

// The elements of one load of 16 bytes.
template <DType kType>
__device__ __forceinline__ void unpack_words(const uint4& words, float* out) {
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (kType == DType::float32) {
      out[w] = __uint_as_float(word[w]);
    } else if constexpr (kType == DType::bfloat16) {
      out[2 * w] = __uint_as_float(word[w] << 16);
      out[2 * w + 1] = __uint_as_float(word[w] & 0xFFFF0000u);
    } else {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word[w]));
      out[2 * w] = pair.x;
      out[2 * w + 1] = pair.y;
    }
  }
}

// A tile as it lies in memory.
template <DType kType>
struct RawTile {
  static constexpr int kBytes = kType == DType::float32 ? 4 : 2;
  static constexpr int kLoads = kBytes * 8 / 16;  // of 16 bytes, for the eight neighbours of a quarter
  uint4 words[4 * kLoads];

  __device__ __forceinline__ void load(const void* data, int64_t index) {
    load_lane(static_cast<const char*>(data) + (index * kTile + lane_id() * 8) * kBytes);
  }

  // `base`: this lane's first elements.
  __device__ __forceinline__ void load_lane(const char* base) {
#pragma unroll
    for (int i = 0; i < 4 * kLoads; ++i) {
      words[i] = __ldcs(reinterpret_cast<const uint4*>(base + i / kLoads * 256 * kBytes + i % kLoads * 16));
    }
  }

  // Any tile; what lies behind the row's end is `pad`, given as the bits of an element.
  __device__ __forceinline__ void load(const DeviceRow& row, int64_t index, uint32_t pad) {
    if (reads_whole(row, index)) return load(row.data, index);
#pragma unroll
    for (int i = 0; i < 4 * kLoads; ++i) {
      uint32_t word[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int64_t at =
            index * kTile + i / kLoads * 256 + lane_id() * 8 + (i % kLoads * 4 + w) * (4 / kBytes);
        if constexpr (kBytes == 4) {
          word[w] = at < row.size ? static_cast<const uint32_t*>(row.data)[at] : pad;
        } else {
          const uint16_t* data = static_cast<const uint16_t*>(row.data);
          const uint32_t low = at < row.size ? data[at] : pad, high = at + 1 < row.size ? data[at + 1] : pad;
          word[w] = low | high << 16;
        }
      }
      words[i] = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }

  __device__ void unpack(LaneTile& tile) const {
#pragma unroll
    for (int i = 0; i < 4 * kLoads; ++i) {
      unpack_words<kType>(words[i], tile.x + i * (16 / kBytes));
    }
  }

  // The same where there is no NaN, in fewer instructions: three integers are compared at a time, in whose
  // order floats of a sign are. With NaN one of the two is NaN, or `high` is more than any element.
  __device__ __forceinline__ void bounds(float& high, float& low) const {
    if constexpr (kType == DType::float32) {
      const auto word = [&](int i) -> uint32_t {
        const uint4& four = words[i / 4];
        return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
      };
      int32_t top = static_cast<int32_t>(word(0));  // the largest, if any has no sign
      uint32_t bottom = word(0);                    // the smallest, if any has one
#pragma unroll
      for (int i = 1; i < 31; i += 2) {
        top = __vimax3_s32(top, static_cast<int32_t>(word(i)), static_cast<int32_t>(word(i + 1)));
        bottom = __vimax3_u32(bottom, word(i), word(i + 1));
      }
      top = max(top, static_cast<int32_t>(word(31)));
      bottom = max(bottom, word(31));
      const bool has_plus = top >= 0, has_minus = static_cast<int32_t>(bottom) < 0;
      uint32_t least = bottom;  // the nearest to zero: of one sign the other end
      if (__any_sync(kAllLanes, !has_plus || !has_minus)) {
#pragma unroll
        for (int i = 0; i < 32; i += 2) least = __vimin3_u32(least, word(i), word(i + 1));
      }
      high = __uint_as_float(has_plus ? static_cast<uint32_t>(top) : least);
      low = __uint_as_float(has_minus ? bottom : least);
    } else {
      extremes(high, low);
    }
  }

  // This lane's largest and smallest element; NaN passed over where there is anything else.
  __device__ void extremes(float& high, float& low) const {
    if constexpr (kType == DType::float32) {
      high = low = __uint_as_float(words[0].x);
#pragma unroll
      for (int i = 0; i < 4 * kLoads; ++i) {
        const uint4& word = words[i];
        high = fmaxf(fmaxf(high, __uint_as_float(word.x)),
                     fmaxf(__uint_as_float(word.y), __uint_as_float(word.z)));
        low = fminf(fminf(low, __uint_as_float(word.x)),
                    fminf(__uint_as_float(word.y), __uint_as_float(word.z)));
        high = fmaxf(high, __uint_as_float(word.w));
        low = fminf(low, __uint_as_float(word.w));
      }
    } else if constexpr (kType == DType::bfloat16) {
      packed_extremes<__nv_bfloat162>(high, low);
    } else {
      packed_extremes<__half2>(high, low);
    }
  }

 private:
  template <class Pair>
  __device__ void packed_extremes(float& high, float& low) const {
    Pair most = reinterpret_cast<const Pair&>(words[0].x), least = most;
#pragma unroll
    for (int i = 0; i < 4 * kLoads; ++i) {
      const uint32_t word[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        most = __hmax2(most, reinterpret_cast<const Pair&>(word[w]));
        least = __hmin2(least, reinterpret_cast<const Pair&>(word[w]));
      }
    }
    high = fmaxf(float(most.x), float(most.y));
    low = fminf(float(least.x), float(least.y));
  }
};

template <DType kType>
__device__ constexpr uint32_t minus_infinity_bits() {
  return kType == DType::float32 ? 0xFF800000u : kType == DType::bfloat16 ? 0xFF80u : 0xFC00u;
}

struct Eight {
  float x[8];
};

// A tile quarter by quarter, eight neighbours a lane, whatever its dtype. kWhole: it can be read 16 bytes at
// a time, and all of it is asked for at once.
template <bool kWhole>
class TileReader {
 public:
  // `of_probs`: what lies behind the end has no probability, rather than no logit.
  __device__ TileReader(const DeviceRow& row, int64_t index, bool of_probs)
      : row_(row), at_(index * kTile + lane_id() * 8), nothing_(of_probs ? 0.0f : -infinity()) {
    if constexpr (kWhole) {
      const int bytes = row.dtype == DType::float32 ? 4 : 2;
      const char* base = static_cast<const char*>(row.data) + at_ * bytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words_[2 * i] = __ldg(reinterpret_cast<const uint4*>(base + i * 256 * bytes));
        if (bytes == 4)
          words_[2 * i + 1] = __ldg(reinterpret_cast<const uint4*>(base + i * 256 * bytes + 16));
      }
    }
  }

  __device__ __forceinline__ Eight next() {
    Eight eight;
    if constexpr (kWhole) {
      const uint32_t word[8] = {words_[0].x, words_[0].y, words_[0].z, words_[0].w,
                                words_[1].x, words_[1].y, words_[1].z, words_[1].w};
      if (row_.dtype == DType::float32) {
#pragma unroll
        for (int j = 0; j < 8; ++j) eight.x[j] = __uint_as_float(word[j]);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t bits = j % 2 == 0 ? word[j / 2] & 0xFFFFu : word[j / 2] >> 16;
          eight.x[j] = row_.dtype == DType::bfloat16 ? float_of_bfloat(bits) : float_of_half(bits);
        }
      }
#pragma unroll
      for (int i = 0; i < 6; ++i) words_[i] = words_[i + 2];
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) eight.x[j] = at_ + j < row_.size ? element_at(row_, at_ + j) : nothing_;
      at_ += 256;
    }
    return eight;
  }

 private:
  const DeviceRow row_;
  int64_t at_;  // this lane's next element
  const float nothing_;
  uint4 words_[8];
};

// A tile as float32, through memory: for what is seldom done.
inline __device__ __noinline__ void load_tile(const DeviceRow& row, int64_t index, bool of_probs,
                                              LaneTile& tile) {
  TileReader<false> reader(row, index, of_probs);
#pragma unroll 1
  for (int quarter = 0; quarter < 4; ++quarter) {
    const Eight eight = reader.next();
#pragma unroll
    for (int j = 0; j < 8; ++j) tile.x[8 * quarter + j] = eight.x[j];
  }
}

// The pinned sum of a tile whose quarters come one after the other.
class PinnedSum {
 public:
  __device__ __forceinline__ void add(int quarter, const Eight& eight) {
    if (quarter % 2 == 0) {
      held_ = eight;
      return;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j)
      half_.x[j] += held_.x[j] + eight.x[j];  // at first to zero, which changes nothing
  }
  // The same value in every lane.
  __device__ float total() const {
    const float* v = half_.x;
    return sum_of_warp(((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])));
  }

 private:
  Eight held_{}, half_{};
};

// Quarters, then neighbours three times, then halves five times. The same value in every lane. `weight(x, i)`
template <class Weight>
__device__ inline float sum_of_tile(Weight weight) {
  float v[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = (weight(j) + weight(8 + j)) + (weight(16 + j) + weight(24 + j));
  const float sum = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
  return sum_of_warp(sum);
}

}  // namespace foretoken::cuda

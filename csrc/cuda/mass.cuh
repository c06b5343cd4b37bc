// Sums of masses, to the last unit.
#pragma once

#include "cuda/tile.cuh"

namespace foretoken::cuda {

// The same in every lane. 64 bits in three parts, whose sums of 32 fit into 32 bits.
__device__ __forceinline__ uint64_t sum_of_masses(uint64_t mass) {
  constexpr uint64_t kPart = (1u << 22) - 1;
  const uint64_t low = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(mass & kPart));
  const uint64_t middle = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(mass >> 22 & kPart));
  const uint64_t high = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(mass >> 44));
  return low + (middle << 22) + (high << 44);
}

// The sum of mass_of(weight) over the at most 32 weights of a lane, in 32 bits and without conversions: a
// weight is split into a multiple of 2^-22 and a rest, and adding 1.5 * 2^n leaves each as a whole number in
// the low bits of a float.
class LaneMass {
 public:
  __device__ __forceinline__ void add(float weight) {
    const float shifted = weight + kCoarse;
    coarse_ += __float_as_uint(shifted);
    fine_ += __float_as_uint(fused(weight - (shifted - kCoarse), 0x1p44f, kFine));
    ++count_;
  }
  __device__ __forceinline__ uint64_t total() const {
    const uint32_t coarse = coarse_ - count_ * __float_as_uint(kCoarse);
    const int32_t fine = static_cast<int32_t>(fine_ - count_ * __float_as_uint(kFine));
    return (static_cast<uint64_t>(coarse) << 22) + static_cast<uint64_t>(static_cast<int64_t>(fine));
  }

 private:
  static constexpr float kCoarse = 3.0f;       // 1.5 * 2^23 * 2^-22
  static constexpr float kFine = 12582912.0f;  // 1.5 * 2^23
  uint32_t coarse_ = 0, fine_ = 0, count_ = 0;
};

}  // namespace foretoken::cuda

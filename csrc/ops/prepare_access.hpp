// How a block of a preparation works and reads: on a device by threads, on the host by one after another,
// so that the proofs need no device.
#pragma once

#include "math/half.hpp"
#include "ops/tensor_view.hpp"

namespace foretoken::preparing {

constexpr int kThreads = 512;
constexpr int64_t kSlice = 4096;  // neighbours in a row that one block edits
constexpr float kMasked = -__builtin_inff();
constexpr int32_t kNotThere = -1;

// phase(t) for every thread t of a block, then a barrier.
template <class Phase>
FORETOKEN_INLINE void all_threads(const Phase& phase) {
#if defined(__CUDA_ARCH__)
  phase(static_cast<int>(threadIdx.x));
  __syncthreads();
#else
  for (int thread = 0; thread < kThreads; ++thread) phase(thread);
#endif
}

FORETOKEN_INLINE void add_to(uint32_t& place, uint32_t value) {
#if defined(__CUDA_ARCH__)
  atomicAdd(&place, value);
#else
  place += value;
#endif
}

FORETOKEN_INLINE void or_into(uint32_t& place, uint32_t bits) {
#if defined(__CUDA_ARCH__)
  atomicOr(&place, bits);
#else
  place |= bits;
#endif
}

FORETOKEN_INLINE void raise_to(int32_t& place, int32_t value) {
#if defined(__CUDA_ARCH__)
  atomicMax(&place, value);
#else
  place = place < value ? value : place;
#endif
}

// Puts `value` in a place that holds `absent`; false if something was there already.
FORETOKEN_INLINE bool settle(float& place, float absent, float value) {
#if defined(__CUDA_ARCH__)
  auto* bits = reinterpret_cast<unsigned*>(&place);
  return atomicCAS(bits, bits_of(absent), bits_of(value)) == bits_of(absent);
#else
  const bool free = bits_of(place) == bits_of(absent);
  if (free) place = value;
  return free;
#endif
}

struct alignas(16) Quad {
  uint32_t word[4];
};

struct alignas(8) Pair {
  uint32_t word[2];
};

template <class Words>
FORETOKEN_INLINE Words words_at(const void* address) {
#if defined(__CUDA_ARCH__)
  return *static_cast<const Words*>(address);
#else
  Words words;
  std::memcpy(&words, address, sizeof words);
  return words;
#endif
}

FORETOKEN_INLINE bool aligned_to(const void* address, size_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

FORETOKEN_INLINE float element_at(const void* row, DType dtype, int64_t index) {
  if (dtype == DType::float32) return static_cast<const float*>(row)[index];
  const uint32_t bits = static_cast<const uint16_t*>(row)[index];
  return dtype == DType::bfloat16 ? float_of_bfloat(bits) : float_of_half(bits);
}

// Four neighbours, in one access where the address allows it; `count` of them are there.
FORETOKEN_INLINE void load_four(const void* row, DType dtype, int64_t first, int64_t count, float* x) {
  const char* const at = static_cast<const char*>(row) + first * (dtype == DType::float32 ? 4 : 2);
  if (count == 4 && dtype == DType::float32 && aligned_to(at, 16)) {
    const Quad quad = words_at<Quad>(at);
    for (int i = 0; i < 4; ++i) x[i] = float_of(quad.word[i]);
  } else if (count == 4 && dtype != DType::float32 && aligned_to(at, 8)) {
    const Pair pair = words_at<Pair>(at);
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = pair.word[i / 2] >> (i % 2 * 16) & 0xFFFFu;
      x[i] = dtype == DType::bfloat16 ? float_of_bfloat(bits) : float_of_half(bits);
    }
  } else {
    for (int i = 0; i < 4; ++i) x[i] = i < count ? element_at(row, dtype, first + i) : 0.0f;
  }
}

FORETOKEN_INLINE void store_four(float* to, int64_t count, const float* x) {
  if (count == 4 && aligned_to(to, 16)) {
    Quad quad;
    for (int i = 0; i < 4; ++i) quad.word[i] = bits_of(x[i]);
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<Quad*>(to) = quad;
#else
    std::memcpy(to, &quad, sizeof quad);
#endif
  } else {
    for (int i = 0; i < 4 && i < count; ++i) to[i] = x[i];
  }
}

}  // namespace foretoken::preparing

// What blocks that share no cluster tell each other: numbers in global memory, and the order in which others
// see what was written before them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace foretoken::cuda {

// What this thread wrote before, or has seen, others see who come to a fence behind having seen what this
// thread writes after.
__device__ inline void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

__device__ inline uint32_t take_ticket(uint32_t* next, uint32_t amount = 1) {
  uint32_t before;
  asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(next), "r"(amount)
               : "memory");
  return before;
}

// How many came before this one; the last of `all` leaves 0 for the next time.
__device__ inline uint32_t arrive(uint32_t* counter, uint32_t all) {
  uint32_t before;
  asm volatile("atom.inc.relaxed.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(all - 1)
               : "memory");
  return before;
}

__device__ inline void raise(uint32_t* flag) {
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}

__device__ inline uint32_t look_at(const uint32_t* number) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(number) : "memory");
  return value;
}

// Into the second-level cache.
__device__ inline void fetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Between two looks, so that those who work are not kept from memory.
__device__ inline void pause() { __nanosleep(100); }

}  // namespace foretoken::cuda

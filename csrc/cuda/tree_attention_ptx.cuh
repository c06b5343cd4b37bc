// What the kernels of tree attention say in PTX: barriers in shared memory, copies into it, matrix products.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace foretoken::cuda::attend {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasCopyEngine = false;
#else
constexpr bool kHasCopyEngine = true;
#endif

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ------------------------------------------------------------------------------- barriers and copies

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

// Counts as this thread's arrival once all copies it has begun are there.
__device__ inline void barrier_arrive_behind_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
#define FORETOKEN_BARRIER_TEST "mbarrier.try_wait.parity.shared::cta.b64"
#else
#define FORETOKEN_BARRIER_TEST "mbarrier.test_wait.parity.shared.b64"
#endif
  uint32_t done = 0;
  while (done == 0) {
    asm volatile("{\n.reg .pred p;\n" FORETOKEN_BARRIER_TEST " p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  }
#undef FORETOKEN_BARRIER_TEST
}

// 16 bytes; `bytes` of them from memory, zeros behind.
__device__ inline void copy16(uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Tensors as the copy engine knows them.
struct Maps {
  CUtensorMap k, v;
};

// `bytes` are going to come by the copy engine; this thread has arrived.
__device__ inline void barrier_expect([[maybe_unused]] uint32_t barrier, [[maybe_unused]] uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(barrier),
      "r"(bytes)
      : "memory");
#endif
}

// A box of a cache: 64 columns of some slots of a page and head.
__device__ inline void copy_box([[maybe_unused]] uint32_t to, [[maybe_unused]] const CUtensorMap* map,
                                [[maybe_unused]] int column, [[maybe_unused]] int slot,
                                [[maybe_unused]] int head, [[maybe_unused]] int page,
                                [[maybe_unused]] uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
      "%5}], "
      "[%6];" ::"r"(to),
      "l"(map), "r"(column), "r"(slot), "r"(head), "r"(page), "r"(barrier)
      : "memory");
#endif
}

__device__ inline void prefetch_map([[maybe_unused]] const CUtensorMap* map) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// What ordinary stores and copies have written is there for the matrix units.
__device__ inline void publish_to_matrix_units() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ inline void sync_threads_of(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Waits for nobody.
__device__ inline void arrive_at(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline bool any_of_threads(int barrier, int threads, bool mine) {
  int result;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.s32 p, %1, 0;\nbar.red.or.pred q, %2, %3, p;\nselp.s32 %0, 1, 0, q;\n}"
      : "=r"(result)
      : "r"(static_cast<int>(mine)), "r"(barrier), "r"(threads)
      : "memory");
  return result != 0;
}

template <int kRegisters>
__device__ inline void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ inline void leave_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

__device__ inline uint32_t load_acquire(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---------------------------------------------------------------------------------- matrix products

template <class Element>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<Element, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

__device__ inline void load_transposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// c += a b: 16 x 16 by 16 x 8.
template <class Element>
__device__ inline void multiply_16x8(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
#define FORETOKEN_MMA(TYPE)                                                           \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<Element, __half>) {
    FORETOKEN_MMA("f16");
  } else {
    FORETOKEN_MMA("bf16");
  }
#undef FORETOKEN_MMA
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <int kCount>
__device__ inline void keep_in_place(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// A matrix in shared memory, rows of 128 bytes in groups of 8 whose 16-byte pieces are permuted (swizzled).
// `apart`: bytes between neighbouring blocks of 64 columns, for matrices whose columns are not summed over.
class Matrix {
 public:
  __device__ Matrix(uint32_t address, uint32_t apart)
      : low_(address >> 4 | apart >> 4 << 16) {}  // to be the same in all lanes
  __device__ uint64_t at(uint32_t bytes) const {
    constexpr uint32_t kHigh = 1u << 30 | 1024 >> 4;
    return static_cast<uint64_t>(kHigh) << 32 | (low_ + (bytes >> 4));
  }

 private:
  uint32_t low_;
};

#define FORETOKEN_REGS8(D, I)                                                                 \
  "+f"(D[I]), "+f"(D[I + 1]), "+f"(D[I + 2]), "+f"(D[I + 3]), "+f"(D[I + 4]), "+f"(D[I + 5]), \
      "+f"(D[I + 6]), "+f"(D[I + 7])
#define FORETOKEN_REGS32(D, I) \
  FORETOKEN_REGS8(D, I), FORETOKEN_REGS8(D, I + 8), FORETOKEN_REGS8(D, I + 16), FORETOKEN_REGS8(D, I + 24)
#define FORETOKEN_LIST32                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FORETOKEN_LIST64                                                                              \
  FORETOKEN_LIST32                                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// 64 rows of a, in shared memory, by 64 rows of b, 16 columns of each; c = or c += the products.
template <class Element>
__device__ inline void multiply_rows(float (&c)[32], uint64_t a, uint64_t b, bool add) {
#define FORETOKEN_WGMMA(TYPE)                                                           \
  asm volatile(                                                                         \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                      \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" FORETOKEN_LIST32 \
      "}, %32, %33, p, 1, 1, 0, 0;\n}"                                                  \
      : FORETOKEN_REGS32(c, 0)                                                          \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<Element, __half>) {
    FORETOKEN_WGMMA("f16");
  } else {
    FORETOKEN_WGMMA("bf16");
  }
#undef FORETOKEN_WGMMA
}

// The same with a in registers.
template <class Element>
__device__ inline void multiply_rows(float (&c)[32], const uint32_t* a, uint64_t b, bool add) {
#define FORETOKEN_WGMMA(TYPE)                                                           \
  asm volatile(                                                                         \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                      \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" FORETOKEN_LIST32 \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"                                    \
      : FORETOKEN_REGS32(c, 0)                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<Element, __half>) {
    FORETOKEN_WGMMA("f16");
  } else {
    FORETOKEN_WGMMA("bf16");
  }
#undef FORETOKEN_WGMMA
}

// 64 rows of a, in registers, by 16 rows of b; c = or c += the products.
template <class Element>
__device__ inline void multiply_weights(float (&c)[32], const uint32_t* a, uint64_t b, bool add) {
#define FORETOKEN_WGMMA(TYPE)                                                           \
  asm volatile(                                                                         \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                      \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" FORETOKEN_LIST32 \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"                                    \
      : FORETOKEN_REGS32(c, 0)                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<Element, __half>) {
    FORETOKEN_WGMMA("f16");
  } else {
    FORETOKEN_WGMMA("bf16");
  }
#undef FORETOKEN_WGMMA
}

template <class Element>
__device__ inline void multiply_weights(float (&c)[64], const uint32_t* a, uint64_t b, bool add) {
#define FORETOKEN_WGMMA(TYPE)                                                            \
  asm volatile(                                                                          \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                       \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" FORETOKEN_LIST64 \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"                                     \
      : FORETOKEN_REGS32(c, 0), FORETOKEN_REGS32(c, 32)                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<Element, __half>) {
    FORETOKEN_WGMMA("f16");
  } else {
    FORETOKEN_WGMMA("bf16");
  }
#undef FORETOKEN_WGMMA
}

#undef FORETOKEN_REGS8
#undef FORETOKEN_REGS32
#undef FORETOKEN_LIST32
#undef FORETOKEN_LIST64

#endif

}  // namespace foretoken::cuda::attend

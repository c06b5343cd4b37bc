#include "cpu/row_kernels.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace foretoken::cpu {

extern const RowKernels kPortableKernels;
#if defined(__x86_64__)
extern const RowKernels kAvx2Kernels;
extern const RowKernels kAvx512Kernels;
#endif

namespace {

struct Candidate {
  const RowKernels* kernels;
  bool supported;
};

const RowKernels* find(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const Candidate candidates[] = {
      {&kAvx512Kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {&kAvx2Kernels,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
      {&kPortableKernels, true},
  };
#else
  const Candidate candidates[] = {{&kPortableKernels, true}};
#endif
  for (const Candidate& candidate : candidates) {  // best first
    if (candidate.supported && (name == nullptr || std::strcmp(name, candidate.kernels->name) == 0)) {
      return candidate.kernels;
    }
  }
  return nullptr;
}

std::atomic<const RowKernels*> chosen{nullptr};

}  // namespace

const RowKernels* row_kernels_named(const char* name) { return find(name); }

void force_row_kernels(const RowKernels& kernels) { chosen.store(&kernels, std::memory_order_relaxed); }

const RowKernels& row_kernels() {
  const RowKernels* kernels = chosen.load(std::memory_order_relaxed);
  if (kernels == nullptr) {
    const char* wanted = std::getenv("FORETOKEN_CPU");
    kernels = wanted != nullptr ? find(wanted) : nullptr;
    if (kernels == nullptr) kernels = find(nullptr);
    chosen.store(kernels, std::memory_order_relaxed);
  }
  return *kernels;
}

}  // namespace foretoken::cpu

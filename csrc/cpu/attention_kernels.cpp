#include "cpu/attention_kernels.hpp"

#include <cstring>

#include "cpu/row_kernels.hpp"

namespace foretoken::cpu {

extern const AttentionKernels kPortableAttention;
#if defined(__x86_64__)
extern const AttentionKernels kAvx2Attention;
extern const AttentionKernels kAvx512Attention;
#endif

const AttentionKernels& attention_kernels() {
#if defined(__x86_64__)
  const char* path = row_kernels().name;
  if (std::strcmp(path, kAvx512Attention.name) == 0) return kAvx512Attention;
  if (std::strcmp(path, kAvx2Attention.name) == 0) return kAvx2Attention;
#endif
  return kPortableAttention;
}

}  // namespace foretoken::cpu

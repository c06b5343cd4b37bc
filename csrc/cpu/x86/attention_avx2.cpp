#include "cpu/x86/attention_vector_avx2.hpp"

#define FORETOKEN_ATTENTION kAvx2Attention
#define FORETOKEN_ATTENTION_NAME "avx2"
#include "cpu/attention_kernels.inl"

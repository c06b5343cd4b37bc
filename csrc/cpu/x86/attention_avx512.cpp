#include "cpu/x86/attention_vector_avx512.hpp"

#define FORETOKEN_ATTENTION kAvx512Attention
#define FORETOKEN_ATTENTION_NAME "avx512"
#include "cpu/attention_kernels.inl"

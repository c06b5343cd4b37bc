#include "cpu/attention_vector_portable.hpp"

#define FORETOKEN_ATTENTION kPortableAttention
#define FORETOKEN_ATTENTION_NAME "portable"
#include "cpu/attention_kernels.inl"

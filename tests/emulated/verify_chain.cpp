#include "cuda/verify_chain.cu"

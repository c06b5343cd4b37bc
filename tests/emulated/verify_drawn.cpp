#include "cuda/verify_drawn.cu"

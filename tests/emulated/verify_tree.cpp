#include "cuda/verify_tree.cu"

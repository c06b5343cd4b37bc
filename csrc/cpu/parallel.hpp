// Threads over the rows of a batch, from the OpenMP pool that torch uses too.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace foretoken::cpu {

// Elements below which waking a second thread costs more than it saves (a wake-up is some 5 us, an element
// 0.4 ns).
constexpr int64_t kParallelElements = int64_t{1} << 16;

template <class Body>
void parallel_rows(int64_t rows, int64_t elements_per_row, Body body) {
#if defined(_OPENMP)
  if (rows > 1 && rows * elements_per_row >= kParallelElements && !omp_in_parallel()) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t row = 0; row < rows; ++row) body(row);
    return;
  }
#endif
  for (int64_t row = 0; row < rows; ++row) body(row);
}

}  // namespace foretoken::cpu

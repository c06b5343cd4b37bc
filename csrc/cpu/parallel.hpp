// Threads over independent items (rows of a batch, runs of tiles), from the OpenMP pool that torch uses too.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace foretoken::cpu {

// Elements below which a second thread is not woken: a wake-up costs some 5 us, an element 0.2 ns, and on a
// busy machine the second thread may be late by a scheduler's quantum.
constexpr int64_t kParallelElements = int64_t{1} << 17;

inline int max_threads() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// Of the thread that runs an item, below max_threads() as it was outside.
inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline int threads_for(int64_t items, int64_t elements_per_item) {
  return items > 1 && items * elements_per_item >= kParallelElements ? max_threads() : 1;
}

template <class Body>
void parallel_for(int64_t items, int64_t elements_per_item, Body body) {
#if defined(_OPENMP)
  const int threads = threads_for(items, elements_per_item);
  if (threads > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t item = 0; item < items; ++item) body(item);
    return;
  }
#endif
  for (int64_t item = 0; item < items; ++item) body(item);
}

}  // namespace foretoken::cpu

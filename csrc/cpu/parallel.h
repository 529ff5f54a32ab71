// Work split over threads on the process's OpenMP runtime, the one torch uses, so that
// torch.set_num_threads governs these kernels too.
#pragma once

#include <omp.h>

#include <cstdint>

namespace cgpt::CGPT_TIER {

// Waking the team costs about as much as this many element operations (5 us).
constexpr int64_t kParallelGrain = 16384;

// Threads a kernel may use here: torch.set_num_threads's number, or one inside a parallel region.
inline int64_t available_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// Calls f(begin, end) over contiguous parts of [0, n), one part per thread. `cost` is the work of
// one item in element operations. The split depends on n and the thread count only.
template <class F>
void parallel_ranges(int64_t n, int64_t cost, F&& f) {
  int64_t threads = omp_get_max_threads();
  if (omp_in_parallel()) threads = 1;
  const int64_t useful = (n * cost) / kParallelGrain;
  if (threads > useful) threads = useful;
  if (threads > n) threads = n;
  if (threads <= 1) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const int64_t t = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = n * t / team, end = n * (t + 1) / team;
    if (begin < end) f(begin, end);
  }
}

// Calls f(item) for every item of [0, n), handed out one by one: for items of unequal work.
template <class F>
void parallel_items(int64_t n, int64_t cost, F&& f) {
  int64_t threads = omp_get_max_threads();
  if (omp_in_parallel()) threads = 1;
  const int64_t useful = (n * cost) / kParallelGrain;
  if (threads > useful) threads = useful;
  if (threads > n) threads = n;
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(threads))
  for (int64_t i = 0; i < n; ++i) f(i);
}

}  // namespace cgpt::CGPT_TIER

// How layer norm's kernels lay rows out over threads, and the sums of a row.
#pragma once

#include "../../cuda/device.cuh"

namespace cgpt {
namespace {

using namespace cuda;

// 256 threads: eight blocks fill the 2048 threads of a multiprocessor.
constexpr int kThreads = 256;
// Values of a row that one thread holds: 32 floats, or as many 16-bit values.
constexpr int kHeld = 32;

struct Shared {
  float scratch[2 * kThreads / kWarp];
};

// Sums over the kSpan threads that share a row, a warp or the block.
template <int kSpan, int n>
__device__ inline void row_sums(float (&x)[n]) {
  if constexpr (kSpan == kWarp) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = warp_sum(x[i]);
  } else {
    block_sums<kThreads>(x, shared<Shared>()->scratch);
  }
}
template <int kSpan>
__device__ inline float row_sum(float x) {
  float sums[1] = {x};
  row_sums<kSpan>(sums);
  return sums[0];
}

}  // namespace
}  // namespace cgpt

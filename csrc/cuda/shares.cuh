// Sums over rows in a fixed order, without atomics: each block leaves its share, a second kernel
// adds the shares up in the order of the blocks.
#pragma once

#include "device.cuh"
#include "launch.h"

namespace cgpt::cuda {

constexpr int kShareThreads = 256;

// One of up to two sums that are made in one launch.
struct ShareSum {
  const float* shares;  // [count, C]
  void* out;            // [C] of dtype, or nullptr
  DType dtype;
};

struct ShareSums {
  ShareSum sum[2];
  int64_t count, C;
};

// A block adds 32 columns: each warp every eighth share, then one warp what the eight have.
// Anonymous, so that every op's translation unit has a kernel of its own.
namespace {

__global__ void __launch_bounds__(kShareThreads) add_shares_kernel(const ShareSums p) {
  constexpr int kWarps = kShareThreads / kWarp;
  float* partial = shared<float>();  // [kWarps][32]
  const ShareSum s = block_y() == 0 ? p.sum[0] : p.sum[1];
  const int64_t c = int64_t{block_x()} * kWarp + lane();
  float total = 0.0f;
  if (s.out && c < p.C)
    for (int64_t i = warp(); i < p.count; i += kWarps) total += s.shares[i * p.C + c];
  partial[warp() * kWarp + lane()] = total;
  block_barrier();
  if (warp() != 0 || !s.out || c >= p.C) return;
  total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += partial[w * kWarp + lane()];
  if (s.dtype == DType::f32) static_cast<float*>(s.out)[c] = total;
  if (s.dtype == DType::bf16) static_cast<bf16*>(s.out)[c] = from_float<bf16>(total);
  if (s.dtype == DType::f16) static_cast<f16*>(s.out)[c] = from_float<f16>(total);
}

}  // namespace

inline void add_shares(const char* op, const ShareSums& sums, const TensorView& like) {
  launch(op,
         {.grid_x = (sums.C + kWarp - 1) / kWarp,
          .grid_y = 2,
          .threads = kShareThreads,
          .shared = kShareThreads * sizeof(float),
          .like = like},
         &add_shares_kernel, sums);
}

}  // namespace cgpt::cuda

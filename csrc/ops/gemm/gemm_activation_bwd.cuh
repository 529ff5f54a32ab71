// What the gradients of gemm share: g = dy * activation'(pre), rounded to T, and its sums over
// rows.
//
// A block takes 64 rows of 256 columns, a warp every eighth of the rows, a lane 8 columns. Reads dy
// and pre once and writes g once: 3 * M * N * sizeof(T) bytes, and a share of dbias a block. Rows
// go along the grid's x, which has no end: along y there are 65535 blocks, 4 million rows.
#pragma once

#include "gemm_epilogue.cuh"

namespace cgpt {
namespace {

constexpr int kSlopeThreads = 256;
constexpr int kSlopeColumns = 256;

template <class T>
struct Slope {
  const T* dy;
  const T* pre;
  T* g;
  float* shares;
  int64_t M, N, dy_stride, pre_stride, g_stride;
  Activation activation;
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kSlopeThreads) gemm_activation_bwd_kernel(const Slope<T> p) {
  constexpr int kWarps = kSlopeThreads / kWarp;
  float* const partial = shared<float>();  // [warps][columns]
  const int64_t column = int64_t{block_y()} * kSlopeColumns + lane() * 8;
  const int64_t end = (int64_t{block_x()} + 1) * kGemmShareRows;
  Vec<float, 8> total{};
#pragma unroll 2
  for (int64_t r = end - kGemmShareRows + warp(); r < end && r < p.M; r += kWarps) {
    Vec<T, 8> v = load_part<kAligned, 8>(p.dy + r * p.dy_stride + column, p.N - column);
    if (p.pre) {
      const auto pre = load_part<kAligned, 8>(p.pre + r * p.pre_stride + column, p.N - column);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        v[i] = from_float<T>(to_float(v[i]) * activation_slope(to_float(pre[i]), p.activation));
      store_part<kAligned>(p.g + r * p.g_stride + column, v, p.N - column);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) total[i] += to_float(v[i]);
  }
  if (!p.shares) return;
  store(partial + warp() * kSlopeColumns + lane() * 8, total);
  block_barrier();
  const int64_t n = int64_t{block_y()} * kSlopeColumns + thread();
  if (n >= p.N) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += partial[w * kSlopeColumns + thread()];
  p.shares[int64_t{block_x()} * p.N + n] = sum;
}

}  // namespace
}  // namespace cgpt

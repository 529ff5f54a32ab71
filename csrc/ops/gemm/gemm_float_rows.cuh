// Products in fp32 with few rows of x, as in decoding: bound by reading the weight.
//
// A block takes 4 rows of x; more are more blocks beside it, which find the weight in L2. Along K
// value k always goes to the same one of 64 sums, number k / 4 % 64, and these are added up in one
// order, so that the layout of the weight changes no bit:
//
//   [N, K]   a warp per column of y, 8 columns a block; a lane has sums l and l + 32
//   [K, N]   16 columns a block, four a lane, a lane has one sum of each, a line of 64 bytes is
//   read
//            by 4 lanes
//
// Reads the weight once: 4 N K bytes, in flight 24 and 32 KB a block.
#pragma once

#include "gemm_epilogue.cuh"

namespace cgpt {
namespace {

constexpr int kFloatRows = 4;
constexpr int kFloatRowsThreads = 256;
constexpr int kFloatRowsWarps = kFloatRowsThreads / kWarp;
constexpr int kFloatRowsStep = 256;  // along K: 4 values for each of 64 sums
template <bool kDenseK>
constexpr int kFloatRowsDepth = kDenseK ? 3 : 2;  // steps whose loads are under way
template <bool kDenseK>
constexpr int kFloatRowsColumns = kDenseK ? kFloatRowsWarps : 16;
template <bool kDenseK>
constexpr int kFloatRowsShared =
    kDenseK ? 0 : kFloatRowsWarps * kFloatRows * kFloatRowsColumns<kDenseK> * 4;

template <bool kDenseK, bool kVectors>
__global__ void __launch_bounds__(kFloatRowsThreads, 2)
    gemm_float_rows_kernel(const Product<float> p) {
  constexpr int kDepth = kFloatRowsDepth<kDenseK>, kColumns = kFloatRowsColumns<kDenseK>;
  const int64_t groups = (p.M() + kFloatRows - 1) / kFloatRows;
  const int64_t m0 = block_x() % groups * kFloatRows, n0 = block_x() / groups * kColumns;
  const auto row = [&](int r, int64_t k) {
    const int64_t left = m0 + r < p.M() ? p.K - k : 0;
    return load_part<kVectors, 4>(p.a.data + (m0 + r) * p.a.row_stride + k, left);
  };

  if constexpr (kDenseK) {
    const int64_t n = n0 + warp();
    const float* const weight = p.b.data + n * p.b.row_stride;
    float sums[2][kFloatRows] = {};
    for (int64_t first = 4 * lane(); first < p.K; first += kDepth * kFloatRowsStep) {
      Vec<float, 4> w[kDepth][2];
#pragma unroll
      for (int d = 0; d < kDepth; ++d)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t k = first + d * kFloatRowsStep + half * 4 * kWarp;
          w[d][half] = load_part<kVectors, 4>(weight + k, n < p.N() ? p.K - k : 0);
        }
#pragma unroll
      for (int d = 0; d < kDepth; ++d)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int r = 0; r < kFloatRows; ++r) {
            const auto x = row(r, first + d * kFloatRowsStep + half * 4 * kWarp);
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[half][r] = fmaf(x[j], w[d][half][j], sums[half][r]);
          }
    }
    float mine = 0.0f;
#pragma unroll
    for (int r = 0; r < kFloatRows; ++r) {
      float sum = sums[0][r] + sums[1][r];
#pragma unroll
      for (const int offset : {8, 16, 1, 2, 4}) sum += shuffle_xor(sum, offset);
      if (lane() == r) mine = sum;
    }
    if (lane() < kFloatRows) finish<false>(p, m0 + lane(), n, Vec<float, 1>{{mine}});
  } else {
    float* const partial = shared<float>();  // [warps][rows][columns]
    const int column = lane() % 4 * 4, sum_of = lane() / 4 % 2 * 32 + lane() / 8 * 8 + warp();
    const int64_t n = n0 + column;
    float sums[kFloatRows][4] = {};
    for (int64_t first = 4 * sum_of; first < p.K; first += kDepth * kFloatRowsStep) {
      Vec<float, 4> w[kDepth][4];
#pragma unroll
      for (int d = 0; d < kDepth; ++d)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t k = first + d * kFloatRowsStep + j;
          w[d][j] =
              load_part<kVectors, 4>(p.b.data + k * p.b.k_stride + n, k < p.K ? p.N() - n : 0);
        }
#pragma unroll
      for (int d = 0; d < kDepth; ++d)
#pragma unroll
        for (int r = 0; r < kFloatRows; ++r) {
          const auto x = row(r, first + d * kFloatRowsStep);
#pragma unroll
          for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[r][i] = fmaf(x[j], w[d][j][i], sums[r][i]);
        }
    }
#pragma unroll
    for (int r = 0; r < kFloatRows; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (const int offset : {4, 8, 16}) sums[r][i] += shuffle_xor(sums[r][i], offset);
        if (lane() < 4) partial[(warp() * kFloatRows + r) * kColumns + column + i] = sums[r][i];
      }
    block_barrier();
    if (thread() >= kFloatRows * kColumns) return;
    const auto of = [&](int w) { return partial[w * kFloatRows * kColumns + thread()]; };
    static_assert(kFloatRowsWarps == 8);
    const float sum = ((of(0) + of(1)) + (of(2) + of(3))) + ((of(4) + of(5)) + (of(6) + of(7)));
    finish<false>(p, m0 + thread() / kColumns, n0 + thread() % kColumns, Vec<float, 1>{{sum}});
  }
}

}  // namespace
}  // namespace cgpt

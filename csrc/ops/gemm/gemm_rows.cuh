// Products with at most 16 rows of x, as in decoding: bf16 and fp16, bound by reading the weight.
//
// The 16 rows are the whole of an mma's m. A block of 8 warps makes 16 columns of y (32 where the
// weight is [K, N]); the warps divide K among them, in steps of 32 that lie side by side, and their
// sums are added up in the order of the warps. Fragments are loaded from global memory straight
// into registers: along K an mma may take values in any order that both factors share, so a lane
// takes 8 consecutive ones, 16 bytes. Reads the weight once: N * K * sizeof(T) bytes.
#pragma once

#include "gemm_epilogue.cuh"

namespace cgpt {
namespace {

constexpr int kFewRows = 16;
constexpr int kRowsThreads = 256;
constexpr int kRowsWarps = kRowsThreads / kWarp;
constexpr int kRowsSlice = 32;  // 8 values along K for each of a quad's lanes
// Slices whose loads are under way before the first mma: 32 KB a block in either layout, which by
// Little's law (2 MB in flight at 3.3 TB/s and 600 ns) is twice what a multiprocessor must wait
// for.
template <bool kDenseK>
constexpr int kRowsDepth = kDenseK ? 4 : 2;

template <bool kDenseK>
constexpr int kRowsColumns = kDenseK ? 16 : 32;

template <class T>
__device__ inline uint32_t pair(T low, T high) {
  return low.bits | uint32_t{high.bits} << 16;
}

// The columns of one lane and the 8 values along K from k on, as factors b of two mma for each of
// kTiles tiles of 8 columns. Column g of tile j is column n0 + 8 j + g of y where the weight is
// dense along K, else n0 + 4 g + j, so that a lane reads four neighbours at once.
template <bool kDenseK, bool kVectors, int kTiles, class T>
__device__ inline void load_columns(uint32_t (&b)[kTiles][4], const Operand<T>& w, int64_t n0,
                                    int64_t k, int64_t K) {
  const int g = lane() / 4;
  if constexpr (kDenseK) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int64_t n = n0 + 8 * j + g;
      const int64_t left = n < w.rows ? K - k : 0;
      const auto v = load_part<kVectors, 8>(w.data + n * w.row_stride + k, left);
#pragma unroll
      for (int i = 0; i < 4; ++i) b[j][i] = pair(v[2 * i], v[2 * i + 1]);
    }
  } else {
    const int64_t n = n0 + 4 * g;
    Vec<T, 4> v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      v[i] = load_part<kVectors, 4>(w.data + (k + i) * w.k_stride + n, k + i < K ? w.rows - n : 0);
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) b[j][i] = pair(v[2 * i][j], v[2 * i + 1][j]);
  }
}

template <class T, bool kDenseK, bool kVectors>
__global__ void __launch_bounds__(kRowsThreads, kVectors ? 2 : 1)
    gemm_rows_kernel(const Product<T> p) {
  constexpr int kColumns = kRowsColumns<kDenseK>, kTiles = kColumns / 8;
  constexpr int kDepth = kRowsDepth<kDenseK>;
  float* const partial = shared<float>();  // [warps][16][columns]
  const int64_t n0 = int64_t{block_x()} * kColumns;
  const int g = lane() / 4, t = lane() % 4;

  float sums[kTiles][4] = {};
  for (int64_t first = warp() * kRowsSlice; first < p.K;
       first += int64_t{kDepth} * kRowsWarps * kRowsSlice) {
    uint32_t b[kDepth][kTiles][4];
    Vec<T, 8> x[kDepth][2];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int64_t k = first + d * kRowsWarps * kRowsSlice + 8 * t;
      load_columns<kDenseK, kVectors>(b[d], p.b, n0, k, p.K);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = g + 8 * half;
        x[d][half] =
            load_part<kVectors, 8>(p.a.data + m * p.a.row_stride + k, m < p.M() ? p.K - k : 0);
      }
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto& low = x[d][0];
        const auto& high = x[d][1];
        const uint32_t a[4] = {pair(low[4 * i], low[4 * i + 1]), pair(high[4 * i], high[4 * i + 1]),
                               pair(low[4 * i + 2], low[4 * i + 3]),
                               pair(high[4 * i + 2], high[4 * i + 3])};
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const uint32_t half[2] = {b[d][j][2 * i], b[d][j][2 * i + 1]};
          mma<T>(sums[j], a, half);
        }
      }
  }

#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = g + i / 2 * 8, column = 2 * t + i % 2;
      partial[(warp() * kFewRows + row) * kColumns + (kDenseK ? 8 * j + column : 4 * column + j)] =
          sums[j][i];
    }
  block_barrier();
  constexpr int kEach = kFewRows * kColumns / kRowsThreads;
  const int at = thread() * kEach;
  Vec<float, kEach> total{};
#pragma unroll
  for (int w = 0; w < kRowsWarps; ++w)
#pragma unroll
    for (int i = 0; i < kEach; ++i) total[i] += partial[w * kFewRows * kColumns + at + i];
  finish<false>(p, at / kColumns, n0 + at % kColumns, total);
}

}  // namespace
}  // namespace cgpt

// Products with a weight quantized to int8 or int4 (packed.h): bf16 and fp16 rows of x.
//
// Up to 16 rows: a block of 8 warps takes one panel of 32 columns, the warps divide K in steps of
// 32. The layout that the CPU kernels read is one that an mma can, too: 16 bytes of a panel are 4
// columns by 4 (int8) or 8 (int4) neighbouring k, the fragments of a lane, once the integers are
// written as T, which is exact. Scales are applied to fp32 sums: of all K for int8, of each step
// for int4. Reads the packed weight once, about N * K bytes, or half of them.
//
// More rows: one pass writes the weight as T, the kernels for that do the rest.
#pragma once

#include "gemm_epilogue.cuh"
#include "packed_gemm_cuda.h"

namespace cgpt {
namespace {

constexpr int kPackedThreads = 256;
constexpr int kPackedWarps = kPackedThreads / kWarp;
constexpr int kPackedStep = 32;  // along K: 8 values for each of a quad's lanes
// Steps whose loads are under way before the first mma: what 128 registers hold, two blocks a
// multiprocessor.
template <bool kInt4>
constexpr int kPackedDepth = kInt4 ? 3 : 4;
constexpr int kPanel = 32;       // columns that lie together
constexpr int kQuadBytes = 128;  // 4 (int8) or 8 (int4) values along K of a panel

template <class T>
struct PackedProduct {
  Product<T> p;  // but for b, which has rows only
  const uint8_t* packed;
  int64_t panel_bytes, padded_k;
  int group;  // k that share a scale, int4
};

// An integer in 0 .. 255, less `offset`, without a conversion: the float 2^23 + n has n for its low
// bits.
__device__ inline float small_float(uint32_t n, float offset) {
  return __builtin_bit_cast(float, 0x4b000000u | n) - (8388608.0f + offset);
}

// Four int8, as the low and high pair of an mma's factor.
template <class T>
__device__ inline void widen_int8(uint32_t (&r)[2], uint32_t bytes) {
  const uint32_t u = bytes ^ 0x80808080u;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    r[i] = pack<T>(small_float(u >> 16 * i & 0xff, 128.0f),
                   small_float(u >> (16 * i + 8) & 0xff, 128.0f));
}
// Eight int4: k .. k + 3 in the low halves of the bytes, k + 4 .. k + 7 in the high ones.
template <class T>
__device__ inline void widen_int4(uint32_t (&r)[4], uint32_t bytes) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t u = bytes >> (16 * (i % 2) + 4 * (i / 2));
    r[i] = pack<T>(small_float(u & 0xf, 8.0f), small_float(u >> 8 & 0xf, 8.0f));
  }
}

// Where the 8 k from k on of a panel's column 0 lie.
template <class T>
__device__ inline const uint8_t* int4_block(const PackedProduct<T>& q, const uint8_t* panel,
                                            int64_t k) {
  const int64_t group_bytes = q.group * (kPanel / 2) + 2 * kPanel;
  return panel + k / q.group * group_bytes + k % q.group / 8 * kQuadBytes;
}
// The bf16 scales of the group of k.
template <class T>
__device__ inline const bf16* int4_scales(const PackedProduct<T>& q, const uint8_t* panel,
                                          int64_t k) {
  return reinterpret_cast<const bf16*>(int4_block(q, panel, k / q.group * q.group) +
                                       q.group * (kPanel / 2));
}

template <class T, bool kInt4>
__global__ void __launch_bounds__(kPackedThreads, 2)
    packed_gemm_rows_kernel(const PackedProduct<T> q) {
  constexpr int kLoads = kInt4 ? 1 : 2, kTiles = kPanel / 8, kDepth = kPackedDepth<kInt4>;
  const Product<T>& p = q.p;
  float* const partial = shared<float>();  // [warps][16][columns]
  const uint8_t* const panel = q.packed + int64_t{block_x()} * q.panel_bytes;
  const int g = lane() / 4, t = lane() % 4;

  float sums[kTiles][4] = {};
  for (int64_t first = warp() * kPackedStep; first < q.padded_k;
       first += int64_t{kDepth} * kPackedWarps * kPackedStep) {
    Vec<uint32_t, 4> w[kDepth][kLoads];
    Vec<T, 8> x[kDepth][2], scales[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int64_t step = first + d * kPackedWarps * kPackedStep, k = step + 8 * t;
      const bool there = step < q.padded_k;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const uint8_t* at = kInt4 ? int4_block(q, panel, k) : panel + (k / 4 + i) * kQuadBytes;
        w[d][i] = load_part<true, 4>(reinterpret_cast<const uint32_t*>(at) + 4 * g, there ? 4 : 0);
      }
      if constexpr (kInt4) {
        const auto* at = reinterpret_cast<const T*>(int4_scales(q, panel, step));
        scales[d] = load_part<true, 8>(at + 8 * t, there ? 8 : 0);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = g + 8 * half, left = m < p.M() ? p.K - k : 0;
        const T* from = p.a.data + m * p.a.row_stride + k;
        x[d][half] = p.a.vectors ? load_part<true, 8>(from, left) : load_part<false, 8>(from, left);
      }
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const auto& row = x[d][r % 2];
          const int e = 4 * i + r / 2 * 2;
          a[i][r] = row[e].bits | uint32_t{row[e + 1].bits} << 16;
        }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        uint32_t low[2], high[2];
        if constexpr (kInt4) {
          uint32_t all[4];
          widen_int4<T>(all, w[d][0][j]);
          low[0] = all[0], low[1] = all[1], high[0] = all[2], high[1] = all[3];
          float of_step[4] = {};
          mma<T>(of_step, a[0], low);
          mma<T>(of_step, a[1], high);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float scale = to_float(bf16{scales[d][i % 2 * 4 + j].bits});
            sums[j][i] = fmaf(of_step[i], scale, sums[j][i]);
          }
        } else {
          widen_int8<T>(low, w[d][0][j]);
          widen_int8<T>(high, w[d][kLoads - 1][j]);
          mma<T>(sums[j], a[0], low);
          mma<T>(sums[j], a[1], high);
        }
      }
    }
  }

#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      partial[(warp() * kPackedCudaRows + g + i / 2 * 8) * kPanel + 4 * (2 * t + i % 2) + j] =
          sums[j][i];
  block_barrier();
  constexpr int kEach = kPackedCudaRows * kPanel / kPackedThreads;
  const int at = thread() * kEach, column = at % kPanel;
  Vec<float, kEach> total{};
#pragma unroll
  for (int v = 0; v < kPackedWarps; ++v)
#pragma unroll
    for (int i = 0; i < kEach; ++i) total[i] += partial[v * kPackedCudaRows * kPanel + at + i];
  if constexpr (!kInt4) {
    const auto* scales = reinterpret_cast<const float*>(panel + q.padded_k * kPanel);
#pragma unroll
    for (int i = 0; i < kEach; ++i) total[i] *= scales[column + i];
  }
  finish<false>(p, at / kPanel, int64_t{block_x()} * kPanel + column, total);
}

// out [N, K] = the weight, dense: a thread writes 8 k of a column, a warp 32 columns of a panel.
template <class T, bool kInt4>
__global__ void __launch_bounds__(kPackedThreads)
    unpack_kernel(const PackedProduct<T> q, T* out, int64_t row_stride) {
  const int64_t n = int64_t{block_x()} * kPanel + lane();
  const int64_t k = (int64_t{block_y()} * kPackedWarps + warp()) * 8;
  const uint8_t* const panel = q.packed + int64_t{block_x()} * q.panel_bytes;
  if (n >= q.p.b.rows || k >= q.p.K) return;
  uint32_t words[2];
  float scale;
  if constexpr (kInt4) {
    words[0] = reinterpret_cast<const uint32_t*>(int4_block(q, panel, k))[lane()];
    words[1] = words[0] >> 4;
    scale = to_float(int4_scales(q, panel, k)[lane()]);
  } else {
    const auto* quads = reinterpret_cast<const uint32_t*>(panel + k / 4 * kQuadBytes);
    words[0] = quads[lane()] ^ 0x80808080u, words[1] = quads[kPanel + lane()] ^ 0x80808080u;
    scale = reinterpret_cast<const float*>(panel + q.padded_k * kPanel)[lane()];
  }
  Vec<T, 8> values;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t u = words[i / 4] >> (8 * (i % 4)) & (kInt4 ? 0xf : 0xff);
    values[i] = from_float<T>(small_float(u, kInt4 ? 8.0f : 128.0f) * scale);
  }
  T* const to = out + n * row_stride + k;
  if (q.p.vectors) store_part<true>(to, values, q.p.K - k);
  else store_part<false>(to, values, q.p.K - k);
}

}  // namespace
}  // namespace cgpt

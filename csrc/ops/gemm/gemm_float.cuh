// Tiles of a product in fp32 on the FMA units, for factors of any strides.
//
// A block of two warps makes a 64 x 64 tile, a thread 8 x 8 of it: 64 FMA for four 16-byte reads of
// shared memory. Slices of 16 along K come by cp.async, [k][row]: a factor that is dense along its
// rows 16 bytes at a time where it is aligned, others four bytes at a time, so that alignment and
// layout do not matter: 32 copies a thread beside 1024 FMA. Every fourth slice the sums are added
// to the total, which keeps the error of long sums near that of a blocked product on a CPU.
#pragma once

#include "gemm_epilogue.cuh"

namespace cgpt {
namespace {

constexpr int kFloatThreads = 64;
constexpr int kFloatTile = 64;
constexpr int kFloatSlice = 16;
constexpr int kFloatStages = 3;
// 68: lines stay 16-byte aligned, and values that lie along K go to different banks.
constexpr int kFloatLine = kFloatTile + 4;
constexpr int kFloatFlush = 4;
constexpr int kFloatShared = kFloatStages * 2 * kFloatSlice * kFloatLine * 4;

__global__ void __launch_bounds__(kFloatThreads) gemm_float_kernel(const Product<float> p) {
  constexpr int kEach = kFloatTile * kFloatSlice / kFloatThreads;
  constexpr int kOne = kFloatSlice * kFloatLine;
  float* const memory = shared<float>();
  const TilePlace place = tile_place(block_x(), (p.M() + kFloatTile - 1) / kFloatTile,
                                     (p.N() + kFloatTile - 1) / kFloatTile);
  const int64_t m0 = place.m * kFloatTile, n0 = place.n * kFloatTile;
  const int slices = static_cast<int>((p.K + kFloatSlice - 1) / kFloatSlice);

  const auto copy_one = [&](float* to, const Operand<float>& from, int64_t row0, int64_t k0) {
    const bool dense_k = from.k_stride == 1;
    if (from.vectors && !dense_k) {
#pragma unroll 1  // unrolled, its addresses spill
      for (int i = 0; i < kEach / 4; ++i) {
        const int e = thread() + i * kFloatThreads;
        const int k = e / (kFloatTile / 4), row = e % (kFloatTile / 4) * 4;
        const bool there = row0 + row < from.rows && k0 + k < p.K;
        const float* source = from.data + (k0 + k) * from.k_stride + row0 + row;
        copy_async<16>(to + k * kFloatLine + row, there ? source : from.data, there);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int e = thread() + i * kFloatThreads;
      const int k = dense_k ? e % kFloatSlice : e / kFloatTile;
      const int row = dense_k ? e / kFloatSlice : e % kFloatTile;
      const bool there = row0 + row < from.rows && k0 + k < p.K;
      const float* source = from.data + (row0 + row) * from.row_stride + (k0 + k) * from.k_stride;
      copy_async<4>(to + k * kFloatLine + row, there ? source : from.data, there);
    }
  };
  const auto copy = [&](int slice) {
    float* const to = memory + slice % kFloatStages * 2 * kOne;
    copy_one(to, p.a, m0, int64_t{slice} * kFloatSlice);
    copy_one(to + kOne, p.b, n0, int64_t{slice} * kFloatSlice);
  };

  // Rows tm .. tm + 3 and tm + 32 .. tm + 35, columns likewise.
  const int tm = thread() / 8 * 4, tn = thread() % 8 * 4;
  float total[8][8] = {}, sums[8][8] = {};
#pragma unroll
  for (int s = 0; s < kFloatStages - 1; ++s) {
    if (s < slices) copy(s);
    copy_async_commit();
  }
#pragma unroll 1
  for (int s = 0; s < slices; ++s) {
    copy_async_wait<kFloatStages - 2>();
    block_barrier();
    if (s + kFloatStages - 1 < slices) copy(s + kFloatStages - 1);
    copy_async_commit();
    const float* const slice = memory + s % kFloatStages * 2 * kOne;
#pragma unroll
    for (int k = 0; k < kFloatSlice; ++k) {
      const float* const a = slice + k * kFloatLine + tm;
      const float* const b = slice + kOne + k * kFloatLine + tn;
      const Vec<float, 4> a_low = load<4>(a), a_high = load<4>(a + 32);
      const Vec<float, 4> b_low = load<4>(b), b_high = load<4>(b + 32);
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          sums[i][j] = fmaf(i < 4 ? a_low[i % 4] : a_high[i % 4],
                            j < 4 ? b_low[j % 4] : b_high[j % 4], sums[i][j]);
    }
    if (s % kFloatFlush != kFloatFlush - 1 && s + 1 < slices) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        total[i][j] += sums[i][j];
        sums[i][j] = 0.0f;
      }
  }
  copy_async_wait<0>();
  block_barrier();  // the slices' memory becomes the tile's

#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < 8; j += 4)
      store(memory + tile_index<kFloatTile>(tm + i % 4 + i / 4 * 32, tn + j * 8),
            Vec<float, 4>{{total[i][j], total[i][j + 1], total[i][j + 2], total[i][j + 3]}});
  block_barrier();
  finish_tile<kFloatTile, kFloatTile, kFloatThreads>(p, memory, m0, n0);
}

}  // namespace
}  // namespace cgpt

// Tiles of logits z = x W^T + bias on CUDA, never held beyond a block's registers.
//
// A block of 8 warps makes tiles of 128 rows by 128 classes, a warp 64 by 32 of it. Both operands
// go through shared memory in steps of 64 bytes along K, three stages deep by asynchronous copies;
// the pipeline runs on from one tile to the next. 16-bit types multiply on tensor cores, fp32 by
// FMA in the same fragment layout, so that what follows a tile is written once. Shared memory rows
// are 80 bytes apart: the eight rows of an ldmatrix fall on different banks.
#pragma once

#include "../../cuda/device.cuh"
#include "../../cuda/launch.h"

namespace cgpt {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kBlockM = 128, kBlockN = 128;
constexpr int kWarpsN = 4, kWarpM = 64, kWarpN = 32;
constexpr int kFragM = kWarpM / 16, kFragN = kWarpN / 8;
constexpr int kStepBytes = 64, kPitch = 80, kStages = 3;

struct LogitTiles {
  alignas(16) unsigned char x[kStages][kBlockM][kPitch];
  alignas(16) unsigned char w[kStages][kBlockN][kPitch];
};

struct LogitParams {
  const void* x;       // [M, K] T
  const void* weight;  // [V, K] T
  const void* bias;    // [V] T or fp32, or nullptr
  const int64_t* target;
  int64_t x_stride, weight_stride, target_stride, ignore_index;
  int64_t M, K, V;
  bool bias_is_float;
  float smoothing;
};

// What one thread has of a tile: rows and columns of its accumulators within the tile.
__device__ inline int tile_row(int m, int half) {
  return warp() / kWarpsN * kWarpM + m * 16 + half * 8 + lane() / 4;
}
__device__ inline int tile_column(int n, int half) {
  return warp() % kWarpsN * kWarpN + n * 8 + lane() % 4 * 2 + half;
}

template <class T>
__device__ inline float bias_at(const LogitParams& p, int64_t v) {
  if (!p.bias) return 0.0f;
  if (p.bias_is_float) return static_cast<const float*>(p.bias)[v];
  return to_float(static_cast<const T*>(p.bias)[v]);
}

// One operand's rows [row0, row0 + 128) at k0, 64 bytes each; zeros beyond `rows` and K.
template <class T, bool kAligned>
__device__ inline void load_rows(unsigned char (*to)[kPitch], const void* from, int64_t stride,
                                 int64_t row0, int64_t rows, int64_t k0, int64_t K) {
  constexpr int kParts = kStepBytes / 16, kValues = 16 / static_cast<int>(sizeof(T));
  const T* base = static_cast<const T*>(from);
#pragma unroll
  for (int i = 0; i < kBlockM * kParts / kThreads; ++i) {
    const int at = thread() + i * kThreads, row = at / kParts, part = at % kParts;
    const int64_t k = k0 + part * kValues;
    const bool there = row0 + row < rows && k < K;
    const T* p = there ? base + (row0 + row) * stride + k : base;
    unsigned char* q = &to[row][part * 16];
    if constexpr (kAligned) copy_async<16>(q, p, there);
    else store(reinterpret_cast<T*>(q), load_part<false, kValues>(p, there ? K - k : 0));
  }
}

using Accumulators = float[kFragM][kFragN][4];

// acc += the step that lies in a stage.
template <class T>
__device__ inline void multiply_step(const LogitTiles& s, int stage, Accumulators& acc) {
  const int m0 = warp() / kWarpsN * kWarpM, n0 = warp() % kWarpsN * kWarpN;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < kStepBytes; k += 32) {
      uint32_t a[kFragM][4], b[kFragN / 2][4];
#pragma unroll
      for (int m = 0; m < kFragM; ++m)
        ldmatrix(a[m], &s.x[stage][m0 + m * 16 + lane() % 16][k + lane() / 16 * 16]);
#pragma unroll
      for (int n = 0; n < kFragN / 2; ++n)
        ldmatrix(b[n],
                 &s.w[stage][n0 + n * 16 + lane() / 16 * 8 + lane() % 8][k + lane() / 8 % 2 * 16]);
#pragma unroll
      for (int m = 0; m < kFragM; ++m)
#pragma unroll
        for (int n = 0; n < kFragN; ++n) {
          const uint32_t right[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          mma<T>(acc[m][n], a[m], right);
        }
    }
  } else {
    const auto values = [](const unsigned char* p) {
      return load<4>(reinterpret_cast<const float*>(p));
    };
#pragma unroll
    for (int k = 0; k < kStepBytes; k += 16) {
      Vec<float> b[kFragN][2];
#pragma unroll
      for (int n = 0; n < kFragN; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) b[n][h] = values(&s.w[stage][tile_column(n, h)][k]);
#pragma unroll
      for (int m = 0; m < kFragM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Vec<float> a = values(&s.x[stage][tile_row(m, h)][k]);
#pragma unroll
          for (int n = 0; n < kFragN; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
              for (int i = 0; i < 4; ++i)
                acc[m][n][2 * h + j] = fmaf(a[i], b[n][j][i], acc[m][n][2 * h + j]);
        }
    }
  }
}

// Calls take(v0, acc) for each tile of classes from v_begin to v_end, in order; acc[m][n][2 * h +
// j] is x W^T at row0 + tile_row(m, h), v0 + tile_column(n, j).
template <class T, bool kAligned, class F>
__device__ inline void for_logit_tiles(const LogitParams& p, int64_t row0, int64_t v_begin,
                                       int64_t v_end, F&& take) {
  LogitTiles& s = *shared<LogitTiles>();
  constexpr int kStep = kStepBytes / static_cast<int>(sizeof(T));
  const int steps_each = p.K > kStep ? static_cast<int>((p.K + kStep - 1) / kStep) : 1;
  const int steps = static_cast<int>((v_end - v_begin + kBlockN - 1) / kBlockN) * steps_each;
  const auto load_step = [&](int step) {
    if (step < steps) {
      const int64_t k = int64_t{step % steps_each} * kStep;
      const int64_t v0 = v_begin + int64_t{step / steps_each} * kBlockN;
      load_rows<T, kAligned>(s.x[step % kStages], p.x, p.x_stride, row0, p.M, k, p.K);
      load_rows<T, kAligned>(s.w[step % kStages], p.weight, p.weight_stride, v0, p.V, k, p.K);
    }
    copy_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) load_step(step);
  Accumulators acc = {};
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    block_barrier();  // the step has arrived, and nobody reads the stage that is loaded next
    load_step(step + kStages - 1);
    multiply_step<T>(s, step % kStages, acc);
    if (step % steps_each != steps_each - 1) continue;
    take(v_begin + int64_t{step / steps_each} * kBlockN, acc);
#pragma unroll
    for (int m = 0; m < kFragM; ++m)
#pragma unroll
      for (int n = 0; n < kFragN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;
  }
  block_barrier();  // the shared memory may be used for something else
}

}  // namespace
}  // namespace cgpt

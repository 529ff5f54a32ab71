// What the CUDA gemm does to finished sums: bias, activation, residual, rounding, one write.
#pragma once

#include "../../cuda/device.cuh"
#include "gemm_cuda.h"

namespace cgpt {
namespace {

using namespace cuda;

// One of the two factors of a product, [rows, K].
template <class T>
struct Operand {
  const T* data;
  int64_t rows, row_stride, k_stride;
  bool vectors;  // 8 values along the dense dimension are all there or none, and 16-byte aligned
};

template <class T>
struct Product {
  Operand<T> a, b;
  int64_t K;
  const T* bias;
  const float* bias_f32;
  const T* residual;
  T* y;
  T* pre;
  int64_t residual_stride, y_stride, pre_stride;
  Activation activation;
  bool vectors;  // of everything with N columns

  __device__ int64_t M() const { return a.rows; }
  __device__ int64_t N() const { return b.rows; }
};

constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kInvSqrt2Pi = 0.39894228040143268f;
constexpr float kGeluSlope = 0.79788456080286536f;  // sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;

// 1 / (1 + exp(-2 u)), u of gelu's tanh form: (1 + tanh(u)) / 2 without the digits that tanh(u)
// near -1 loses.
__device__ inline float gelu_gate(float x) {
  const float u = kGeluSlope * (x + kGeluCubic * x * x * x);
  return 1.0f / (1.0f + expf(-2.0f * u));
}

__device__ inline float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::gelu: return 0.5f * x * (1.0f + erff(x * kSqrtHalf));
    case Activation::gelu_tanh: return x * gelu_gate(x);
    case Activation::relu: return x < 0.0f ? 0.0f : x;  // hands NaN on
  }
  return x;
}

__device__ inline float activation_slope(float x, Activation activation) {
  switch (activation) {
    case Activation::none: return 1.0f;
    case Activation::gelu:
      return 0.5f * (1.0f + erff(x * kSqrtHalf)) + x * kInvSqrt2Pi * expf(-0.5f * x * x);
    case Activation::gelu_tanh: {
      const float s = gelu_gate(x);
      return s + x * s * (1.0f - s) * 2.0f * kGeluSlope * (1.0f + 3.0f * kGeluCubic * x * x);
    }
    case Activation::relu: return x > 0.0f ? 1.0f : 0.0f;
  }
  return 1.0f;
}

// y[m, n + i] of kCount sums in a row, of those that lie inside y.
template <bool kAligned, int kCount, class T>
__device__ inline void finish(const Product<T>& p, int64_t m, int64_t n, Vec<float, kCount> v) {
  const int64_t left = p.N() - n;
  if (m >= p.M() || left <= 0) return;
  if (p.bias) {
    const auto bias = load_part<kAligned, kCount>(p.bias + n, left);
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += to_float(bias[i]);
  }
  if (p.bias_f32) {
    const auto bias = load_part<kAligned, kCount>(p.bias_f32 + n, left);
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += bias[i];
  }
  Vec<T, kCount> out;
  if (p.pre) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      out[i] = from_float<T>(v[i]);
      v[i] = to_float(out[i]);
    }
    store_part<kAligned>(p.pre + m * p.pre_stride + n, out, left);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = activate(v[i], p.activation);
  if (p.residual) {
    const auto added = load_part<kAligned, kCount>(p.residual + m * p.residual_stride + n, left);
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += to_float(added[i]);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = from_float<T>(v[i]);
  store_part<kAligned>(p.y + m * p.y_stride + n, out, left);
}

// Where sum (row, column) lies in a block's fp32 tile in shared memory. The exclusive or lets four
// rows of an mma fragment, 8 bytes a lane, go to different banks, and keeps groups of 8 together.
template <int kN>
__device__ inline int tile_index(int row, int column) {
  return row * kN + (column ^ ((row & 3) << 3));
}

// Writes a block's tile: 8 columns a thread, whole rows of the tile by neighbouring threads.
template <int kM, int kN, int kThreads, class T>
__device__ inline void finish_tile(const Product<T>& p, const float* tile, int64_t m0, int64_t n0) {
  constexpr int kAcross = kN / 8;
  const int column = thread() % kAcross * 8;
#pragma unroll 1
  for (int row = thread() / kAcross; row < kM; row += kThreads / kAcross) {
    const auto v = load<8>(tile + tile_index<kN>(row, column));
    if (p.vectors) finish<true>(p, m0 + row, n0 + column, v);
    else finish<false>(p, m0 + row, n0 + column, v);
  }
}

// Blocks walk down kGroup tiles of rows before they go on along the columns, so that those in
// flight share both factors in L2.
struct TilePlace {
  int64_t m, n;
};
__device__ inline TilePlace tile_place(int64_t block, int64_t tiles_m, int64_t tiles_n) {
  constexpr int64_t kGroup = 8;
  const int64_t first = block / (kGroup * tiles_n) * kGroup, inside = block % (kGroup * tiles_n);
  const int64_t height = tiles_m - first < kGroup ? tiles_m - first : kGroup;
  return {first + inside % height, inside / height};
}

}  // namespace
}  // namespace cgpt

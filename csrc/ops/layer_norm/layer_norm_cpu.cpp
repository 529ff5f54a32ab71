// Layer norm on CPU, a few rows at a time, rows over threads; gradients in layer_norm_backward.h.
//
// A row is read from memory once; the further passes over it (centred squares, normalise) find it
// in L1 or L2: four rows of 768 floats are 12 KB, of 5120 80 KB. Traffic: rows * C * sizeof(T),
// read and written once each (twice each with a residual). The variance is the mean of centred
// squares: E[x^2] - E[x]^2 would lose half the digits on rows with a large mean.
#include "layer_norm_backward.h"

namespace cgpt::CGPT_TIER {
namespace {

// Four running vectors a row hide the latency of the addition in a row that is alone, and keep the
// sums of long rows short.
constexpr int kUnroll = 4;

// sums[u] = the sum over c of term(u, c, left), a vector of row u whose first `left` lanes count
// and whose others are 0.
template <int n, class F>
CGPT_INLINE void sum_rows(int64_t C, float (&sums)[n], F&& term) {
  VecF acc[n][kUnroll] = {};
  int64_t c = 0;
  for (; c + kUnroll * kLanes <= C; c += kUnroll * kLanes)
#pragma GCC unroll 4
    for (int u = 0; u < n; ++u)
#pragma GCC unroll 4
      for (int k = 0; k < kUnroll; ++k) acc[u][k] += term(u, c + k * kLanes, kLanes);
  for (; c < C; c += kLanes)
#pragma GCC unroll 4
    for (int u = 0; u < n; ++u) acc[u][0] += term(u, c, C - c);
  for (int u = 0; u < n; ++u)
    sums[u] = reduce_add((acc[u][0] + acc[u][1]) + (acc[u][2] + acc[u][3]));
}

// Rows i .. i + n - 1. A row's bits do not depend on n.
template <int n, class T, class W>
CGPT_INLINE void normalize_rows(const LayerNormArgs& a, int64_t i) {
  const int64_t C = a.x.shape[1];
  const T* row = a.x.as<const T>() + i * a.x.strides[0];
  int64_t ld = a.x.strides[0];
  float sum[n], squares[n];
  VecF m[n], r[n];
  if (a.residual) {
    const int64_t ldr = a.residual.strides[0], lds = a.sum.strides[0];
    const T* residual = a.residual.as<const T>() + i * ldr;
    T* total = a.sum.as<T>() + i * lds;
    sum_rows(C, sum, [&](int u, int64_t c, int64_t left) __attribute__((always_inline)) {
      T* to = total + u * lds + c;
      store_n(to, load_n(row + u * ld + c, left) + load_n(residual + u * ldr + c, left), left);
      return load_n(to, left);
    });
    row = total, ld = lds;
  } else {
    sum_rows(C, sum, [&](int u, int64_t c, int64_t left) __attribute__((always_inline)) {
      return load_n(row + u * ld + c, left);
    });
  }
  for (int u = 0; u < n; ++u) m[u] = set1(sum[u] /= static_cast<float>(C));
  sum_rows(C, squares, [&](int u, int64_t c, int64_t left) __attribute__((always_inline)) {
    const VecF centred = load_n(row + u * ld + c, left, sum[u]) - m[u];
    return centred * centred;
  });
  for (int u = 0; u < n; ++u) {
    const float rstd = 1.0f / __builtin_sqrtf(squares[u] / static_cast<float>(C) + a.eps);
    r[u] = set1(rstd);
    if (a.mean) a.mean.as<float>()[i + u] = sum[u];
    if (a.rstd) a.rstd.as<float>()[i + u] = rstd;
  }
  const W *weight = a.weight.as<const W>(), *bias = a.bias.as<const W>();
  const int64_t ldy = a.y.strides[0];
  T* y = a.y.as<T>() + i * ldy;
  each_vector(C, [&](int64_t c, int64_t left) __attribute__((always_inline)) {
    const VecF w = load_n(weight + c, left), b = bias ? load_n(bias + c, left) : zero();
#pragma GCC unroll 4
    for (int u = 0; u < n; ++u) {
      const VecF xhat = (load_n(row + u * ld + c, left) - m[u]) * r[u];
      store_rounded(y + u * ldy + c, fmadd(xhat, w, b), left);
    }
  });
}

template <class T, class W>
void layer_norm_fwd_kernel(const LayerNormArgs& a) {
  const int64_t rows = a.x.shape[0];
  parallel_ranges(rows, a.x.shape[1], [&](int64_t i, int64_t end) {
    for (; i + kGroupRows <= end; i += kGroupRows) normalize_rows<kGroupRows, T, W>(a, i);
    for (; i < end; ++i) normalize_rows<1, T, W>(a, i);
  });
}

template <class T>
void layer_norm_fwd_weight(const LayerNormArgs& a) {
  if (a.weight.dtype == DType::f32) layer_norm_fwd_kernel<T, float>(a);
  else layer_norm_fwd_kernel<T, T>(a);
}

template <class T>
void layer_norm_bwd_weight(const LayerNormBwdArgs& a) {
  if (a.weight.dtype == DType::f32) layer_norm_bwd_kernel<T, float>(a);
  else layer_norm_bwd_kernel<T, T>(a);
}

}  // namespace

void layer_norm_fwd(const LayerNormArgs& a) {
  if (a.x.dtype == DType::f32) layer_norm_fwd_weight<float>(a);
  if (a.x.dtype == DType::bf16) layer_norm_fwd_weight<bf16>(a);
  if (a.x.dtype == DType::f16) layer_norm_fwd_weight<f16>(a);
}

void layer_norm_bwd(const LayerNormBwdArgs& a) {
  if (a.x.dtype == DType::f32) layer_norm_bwd_weight<float>(a);
  if (a.x.dtype == DType::bf16) layer_norm_bwd_weight<bf16>(a);
  if (a.x.dtype == DType::f16) layer_norm_bwd_weight<f16>(a);
}

}  // namespace cgpt::CGPT_TIER

// Layer norm on CPU, one row at a time, rows over threads; gradients in layer_norm_backward.h.
//
// A row is read from memory once; the further passes over it (centred squares, normalise) find it
// in L1: 5120 floats are 20 KB. Traffic: rows * C * sizeof(T), read and written once each (twice
// each with a residual). The variance is the mean of centred squares: E[x^2] - E[x]^2 would lose
// half the digits on rows with a large mean.
#include "layer_norm_backward.h"

namespace cgpt::CGPT_TIER {
namespace {

// Four running vectors hide the latency of the addition.
constexpr int kUnroll = 4;

template <class T, class F>
CGPT_INLINE float sum_row(const T* row, int64_t C, F&& term) {
  VecF acc[kUnroll] = {};
  int64_t c = 0;
  for (; c + kUnroll * kLanes <= C; c += kUnroll * kLanes)
    for (int u = 0; u < kUnroll; ++u) acc[u] += term(load(row + c + u * kLanes));
  for (; c + kLanes <= C; c += kLanes) acc[0] += term(load(row + c));
  float tail = 0.0f;
  for (; c < C; ++c) tail += term(set1(to_float(row[c])))[0];
  return reduce_add((acc[0] + acc[1]) + (acc[2] + acc[3])) + tail;
}

template <class T>
CGPT_INLINE void add_rows(const T* x, const T* residual, T* sum, int64_t C) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) store(sum + c, load(x + c) + load(residual + c));
  for (; c < C; ++c) sum[c] = from_float<T>(to_float(x[c]) + to_float(residual[c]));
}

template <class T, class W>
CGPT_INLINE void normalize_row(const T* row, const W* weight, const W* bias, float mean, float rstd,
                               T* y, int64_t C) {
  const VecF m = set1(mean), r = set1(rstd);
  const auto affine = [&](VecF x, VecF w, VecF b) { return fmadd((x - m) * r, w, b); };
  int64_t c = 0;
  if (bias) {
    for (; c + kLanes <= C; c += kLanes)
      store(y + c, affine(load(row + c), load(weight + c), load(bias + c)));
  } else {
    for (; c + kLanes <= C; c += kLanes)
      store(y + c, affine(load(row + c), load(weight + c), zero()));
  }
  if (c < C)
    store_n(y + c,
            affine(load_n(row + c, C - c), load_n(weight + c, C - c),
                   bias ? load_n(bias + c, C - c) : zero()),
            C - c);
}

template <class T, class W>
void layer_norm_fwd_kernel(const LayerNormArgs& a) {
  const int64_t rows = a.x.shape[0], C = a.x.shape[1];
  const W* weight = a.weight.as<const W>();
  const W* bias = a.bias.as<const W>();
  parallel_ranges(rows, C, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = a.x.as<const T>() + i * a.x.strides[0];
      if (a.residual) {
        T* sum = a.sum.as<T>() + i * a.sum.strides[0];
        add_rows(row, a.residual.as<const T>() + i * a.residual.strides[0], sum, C);
        row = sum;
      }
      const float mean = sum_row(row, C, [](VecF x) { return x; }) / static_cast<float>(C);
      const VecF m = set1(mean);
      const float squares = sum_row(row, C, [m](VecF x) { return (x - m) * (x - m); });
      const float variance = squares / static_cast<float>(C);
      const float rstd = 1.0f / __builtin_sqrtf(variance + a.eps);
      normalize_row(row, weight, bias, mean, rstd, a.y.as<T>() + i * a.y.strides[0], C);
      if (a.mean) a.mean.as<float>()[i] = mean;
      if (a.rstd) a.rstd.as<float>()[i] = rstd;
    }
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

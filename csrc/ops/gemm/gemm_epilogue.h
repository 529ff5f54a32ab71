// What gemm does to a finished block of x W^T while it is in cache: bias, activation, residual,
// rounding to the output type.
#pragma once

#include "../../cpu/vmath.h"
#include "gemm.h"
#include "low_rank.h"

namespace cgpt::CGPT_TIER {
namespace {

// What happens to a finished sum and where it goes: T is the type of bias and residual, Y of y.
template <class T, class Y = T>
struct GemmEpilogue {
  template <class Args>
  explicit GemmEpilogue(const Args& a)
      : bias(a.bias && a.bias.dtype != DType::f32 ? a.bias.template as<const T>() : nullptr),
        bias_f32(a.bias && a.bias.dtype == DType::f32 ? a.bias.template as<const float>()
                                                      : nullptr),
        residual(a.residual ? a.residual.template as<const T>() : nullptr),
        ldr(a.residual ? a.residual.strides[0] : 0),
        y(a.y.template as<Y>()),
        ldy(a.y.strides[0]),
        activation(a.activation) {}

  const T* bias;
  const float* bias_f32;
  const T* residual;
  int64_t ldr;
  Y* y;
  int64_t ldy;
  Activation activation;
};

// The arguments with their types.
template <class T>
struct GemmProblem : GemmEpilogue<T> {
  explicit GemmProblem(const GemmArgs& a)
      : GemmEpilogue<T>(a),
        M(a.x.shape[0]),
        N(a.y.shape[1]),
        K(a.x.shape[1]),
        x(a.x.as<const T>()),
        ldx(a.x.strides[0]),
        weight(a.weight.as<const T>()),
        ldw(a.weight.strides[0]),
        weight_kn(a.weight_kn),
        low_rank(low_rank_of(a.low_rank, 0, N)) {}

  int64_t M, N, K;
  const T* x;
  int64_t ldx;
  const T* weight;
  int64_t ldw;
  bool weight_kn;
  LowRank low_rank;
};

template <Activation activation>
CGPT_INLINE VecF activate(VecF v) {
  if constexpr (activation == Activation::gelu) return gelu(v);
  if constexpr (activation == Activation::gelu_tanh) return gelu_tanh(v);
  if constexpr (activation == Activation::relu) return relu(v);
  return v;
}

template <Activation activation, class T, class Y>
inline void finish_block(const GemmEpilogue<T, Y>& p, int64_t i0, int64_t rows, int64_t n0,
                         int64_t columns, const float* c, int64_t ldc) {
  for (int64_t i = 0; i < rows; ++i, c += ldc) {
    Y* y = p.y + (i0 + i) * p.ldy + n0;
    const T* residual = p.residual ? p.residual + (i0 + i) * p.ldr + n0 : nullptr;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t left = columns - j;
      VecF v = load_n(c + j, left);
      if (p.bias) v += load_n(p.bias + n0 + j, left);
      if (p.bias_f32) v += load_n(p.bias_f32 + n0 + j, left);
      v = activate<activation>(v);
      if (residual) v += load_n(residual + j, left);
      store_n(y + j, v, left);
    }
  }
}

// y[i0 + i, n0 + j] = activation(c[i, j] + bias[n0 + j]) + residual[i0 + i, n0 + j]
template <class T, class Y>
inline void finish(const GemmEpilogue<T, Y>& p, int64_t i0, int64_t rows, int64_t n0,
                   int64_t columns, const float* c, int64_t ldc) {
  switch (p.activation) {
    case Activation::none: return finish_block<Activation::none>(p, i0, rows, n0, columns, c, ldc);
    case Activation::gelu: return finish_block<Activation::gelu>(p, i0, rows, n0, columns, c, ldc);
    case Activation::gelu_tanh:
      return finish_block<Activation::gelu_tanh>(p, i0, rows, n0, columns, c, ldc);
    case Activation::relu: return finish_block<Activation::relu>(p, i0, rows, n0, columns, c, ldc);
  }
}

}  // namespace
}  // namespace cgpt::CGPT_TIER

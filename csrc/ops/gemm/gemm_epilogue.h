// What gemm does to a finished block of x W^T while it is in cache: bias, activation, dropout,
// residual, rounding to the output type.
#pragma once

#include "../../cpu/philox.h"
#include "../../cpu/vmath.h"
#include "gemm.h"
#include "low_rank.h"

namespace cgpt::CGPT_TIER {
namespace {

// The shared mask on rows of N elements.
struct Dropout {
  uint64_t seed = 0;
  int64_t N = 0;
  uint32_t threshold = 0;  // words below it drop; 0: no dropout
  float scale = 1.0f;

  // Elements whose random words lie in one buffer.
  static constexpr int64_t kStrip = 512;
  struct Buffer {
    uint32_t words[kStrip + 3 + kPhiloxWords];
  };

  Dropout() = default;
  Dropout(double p, uint64_t seed, int64_t N)
      : seed(seed),
        N(N),
        threshold(static_cast<uint32_t>(p * 4294967296.0)),
        scale(static_cast<float>(1.0 / (1.0 - p))) {}

  // Words of the elements (i, n) .. (i, n + count - 1), count up to kStrip.
  const uint32_t* words(int64_t i, int64_t n, int64_t count, Buffer& b) const {
    return philox_range(seed, static_cast<uint64_t>(i * N + n), count, b.words);
  }
  // v where its words say so, scaled, else 0. At least kLanes words are readable from w on: the
  // buffer's last ones may be anything and meet lanes that nobody stores.
  CGPT_INLINE VecF apply(VecF v, const uint32_t* w) const {
    VecI word;
    __builtin_memcpy(&word, w, sizeof(word));
    // There is no unsigned comparison before AVX-512: both sides are shifted into signed order.
    const VecI low = set1i(INT32_MIN);
    const VecI keep = (word ^ low) >= (set1i(static_cast<int32_t>(threshold)) ^ low);
    return select(keep, v * set1(scale), zero());
  }
};

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
  T* pre = nullptr;  // as in GemmArgs
  int64_t ldp = 0;
  Dropout dropout;
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
        low_rank(low_rank_of(a.low_rank, 0, N)) {
    if (a.pre) this->pre = a.pre.as<T>(), this->ldp = a.pre.strides[0];
    if (a.dropout_p > 0.0) this->dropout = Dropout(a.dropout_p, a.seed, N);
  }

  int64_t M, N, K;
  const T* x;
  int64_t ldx;
  bool x_transposed = false;  // x(i, k) lies at x[k * ldx + i]
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

// One row from column n on, up to Dropout::kStrip columns where `words` are given.
template <Activation activation, class T, class Y>
CGPT_INLINE void finish_row(const GemmEpilogue<T, Y>& p, int64_t i, int64_t n, int64_t columns,
                            const float* c, const uint32_t* words) {
  Y* y = p.y + i * p.ldy + n;
  T* pre = p.pre ? p.pre + i * p.ldp + n : nullptr;
  const T* residual = p.residual ? p.residual + i * p.ldr + n : nullptr;
  const auto value = [&](int64_t j, int64_t left) __attribute__((always_inline)) {
    VecF v = load_n(c + j, left);
    if (p.bias) v += load_n(p.bias + n + j, left);
    if (p.bias_f32) v += load_n(p.bias_f32 + n + j, left);
    if (pre) {
      store_n(pre + j, v, left);
      v = load_n(pre + j, left);
    }
    v = activate<activation>(v);
    if (words) v = p.dropout.apply(v, words + j);
    if (residual) v += load_n(residual + j, left);
    return v;
  };
  int64_t j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
    store_two_rounded(y + j, value(j, kLanes), value(j + kLanes, kLanes));
  for (; j < columns; j += kLanes) store_rounded(y + j, value(j, columns - j), columns - j);
}

template <Activation activation, class T, class Y>
inline void finish_block(const GemmEpilogue<T, Y>& p, int64_t i0, int64_t rows, int64_t n0,
                         int64_t columns, const float* c, int64_t ldc) {
  const bool drops = p.dropout.threshold > 0;
  const int64_t strip = drops ? Dropout::kStrip : columns;
  Dropout::Buffer buffer;
  for (int64_t i = 0; i < rows; ++i, c += ldc)
    for (int64_t j = 0; j < columns; j += strip) {
      const int64_t count = columns - j < strip ? columns - j : strip;
      const uint32_t* words = drops ? p.dropout.words(i0 + i, n0 + j, count, buffer) : nullptr;
      finish_row<activation>(p, i0 + i, n0 + j, count, c + j, words);
    }
}

// y[i0 + i, n0 + j] = dropout(activation(c[i, j] + bias[n0 + j])) + residual[i0 + i, n0 + j]
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

// y = dropout(activation(x W^T + scale u v^T + bias)) + residual and its gradients: the contract
// that every backend's gemm keeps.
#pragma once

#include "../../common/tensor_view.h"
#include "../../cpu/dispatch.h"

namespace cgpt {

enum class Activation : uint8_t { none, gelu, gelu_tanh, relu };

// scale u v^T, added to a product's sums: LoRA's part of it. Absent where u is.
struct LowRankTerm {
  TensorView u;  // [M, r], T or fp32
  TensorView v;  // [N, r] in the dtype of u, one stride 1
  float scale = 1.0f;
};

struct GemmArgs {
  TensorView x;         // [M, K], T in fp32, bf16, fp16; any row stride
  TensorView weight;    // [N, K] T ("nk", nn.Linear), or [K, N] where weight_kn ("kn", Conv1D)
  TensorView bias;      // [N], T or fp32, or none
  TensorView residual;  // [M, N] T, or none; may be y itself
  TensorView y;         // [M, N] T
  Activation activation = Activation::none;  // gelu is the erf form, gelu_tanh the tanh form
  bool weight_kn = false;
  LowRankTerm low_rank{};  // CPU only
  // For a backward: receives [M, N] T, the values before the activation, which is then applied to
  // those rounded values; or none.
  TensorView pre{};
  // Element (i, n) is element i * N + n of csrc/cpu/philox.h's mask; survivors grow by 1 / (1 - p).
  double dropout_p = 0.0;  // in [0, 1)
  uint64_t seed = 0;
};

// g = dropout(dy) * activation'(pre), then dx = g W, dweight = g^T x, dbias = column sums of g.
struct GemmBwdArgs {
  TensorView dy;       // [M, N] T, any row stride
  TensorView x;        // [M, K] T
  TensorView weight;   // [N, K], or [K, N] where weight_kn; looked at for dx only
  TensorView pre;      // [M, N] T as the forward left it; none where there is no activation
  TensorView g;        // [M, N] T, working memory; needed with an activation or dropout
  TensorView dx;       // [M, K] T, or none: not wanted
  TensorView dweight;  // [N, K], or [K, N] where dweight_kn; T; or none
  TensorView dbias;    // [N], T or fp32, or none
  Activation activation = Activation::none;
  bool weight_kn = false;
  bool dweight_kn = false;  // differs from weight_kn where weight is a transposed view
  double dropout_p = 0.0;
  uint64_t seed = 0;
};

}  // namespace cgpt

#ifndef CGPT_TIER
  #include "../../common/check.h"

namespace cgpt {

// The activation of a name; "none" is the identity.
inline Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  fail("gemm: unknown activation '" + name + "'. Known: none, gelu, gelu_tanh, relu.");
}

inline void low_rank_check(const Checker& c, const LowRankTerm& t, int64_t M, int64_t N, DType T) {
  if (!t.u) return c.require(!t.v, "v needs u beside it");
  c.require(t.u.ndim == 2, "u must have shape (M, r)");
  const int64_t rank = t.u.shape[1];
  c.tensor("u", t.u, {M, rank});
  c.dtype("u", t.u, {T, DType::f32});
  c.dense_rows("u", t.u);
  c.tensor("v", t.v, {N, rank});
  c.dtype("v", t.v, {t.u.dtype});
  c.require(rank <= 1 || N <= 1 || t.v.strides[0] == 1 || t.v.strides[1] == 1,
            "v must have a stride of 1 in one of its dimensions");
}

inline void dropout_check(const Checker& c, double p) {
  c.require(p >= 0.0 && p < 1.0,
            [&] { return "dropout_p must be in [0, 1), got " + std::to_string(p); });
}

inline void gemm_check(const GemmArgs& a, Device device = Device::cpu) {
  const Checker c{"gemm", device};
  c.require(a.x && a.x.ndim == 2, "x must have shape (M, K)");
  c.require(a.y && a.y.ndim == 2, "y must have shape (M, N)");
  const int64_t M = a.x.shape[0], K = a.x.shape[1], N = a.y.shape[1];
  c.tensor("x", a.x, {M, K});
  c.floating("x", a.x);
  c.tensor("y", a.y, {M, N});
  c.dtype("y", a.y, {a.x.dtype});
  if (a.weight_kn) c.tensor("weight", a.weight, {K, N});
  else c.tensor("weight", a.weight, {N, K});
  c.dtype("weight", a.weight, {a.x.dtype});
  if (a.bias) {
    c.tensor("bias", a.bias, {N});
    c.dtype("bias", a.bias, {a.x.dtype, DType::f32});
  }
  if (a.residual) {
    c.tensor("residual", a.residual, {M, N});
    c.dtype("residual", a.residual, {a.x.dtype});
  }
  if (a.pre) {
    c.tensor("pre", a.pre, {M, N});
    c.dtype("pre", a.pre, {a.x.dtype});
  }
  dropout_check(c, a.dropout_p);
  for (const auto& [name, t] : {std::pair{"x", &a.x},
                                {"weight", &a.weight},
                                {"bias", &a.bias},
                                {"residual", &a.residual},
                                {"y", &a.y},
                                {"pre", &a.pre}})
    c.dense_rows(name, *t);
  low_rank_check(c, a.low_rank, M, N, a.x.dtype);
}

inline void gemm_bwd_check(const GemmBwdArgs& a) {
  const Checker c{"gemm_bwd"};
  c.require(a.x && a.x.ndim == 2, "x must have shape (M, K)");
  c.require(a.dy && a.dy.ndim == 2, "dy must have shape (M, N)");
  const int64_t M = a.x.shape[0], K = a.x.shape[1], N = a.dy.shape[1];
  c.floating("x", a.x);
  const auto matrix = [&](const char* name, const TensorView& t, int64_t rows, int64_t columns) {
    c.tensor(name, t, {rows, columns});
    c.dtype(name, t, {a.x.dtype});
    c.dense_rows(name, t);
  };
  matrix("x", a.x, M, K);
  matrix("dy", a.dy, M, N);
  if (a.dx) {
    matrix("dx", a.dx, M, K);
    if (a.weight_kn) matrix("weight", a.weight, K, N);
    else matrix("weight", a.weight, N, K);
  }
  if (a.dweight && a.dweight_kn) matrix("dweight", a.dweight, K, N);
  if (a.dweight && !a.dweight_kn) matrix("dweight", a.dweight, N, K);
  if (a.dbias) {
    c.tensor("dbias", a.dbias, {N});
    c.dtype("dbias", a.dbias, {a.x.dtype, DType::f32});
    c.dense_rows("dbias", a.dbias);
  }
  dropout_check(c, a.dropout_p);
  if (a.activation != Activation::none) matrix("pre", a.pre, M, N);
  if (a.activation != Activation::none || a.dropout_p > 0.0) matrix("g", a.g, M, N);
}

}  // namespace cgpt
#endif

namespace cgpt {
CGPT_CPU_ENTRY(gemm_fwd, GemmArgs)
CGPT_CPU_ENTRY(gemm_bwd, GemmBwdArgs)
}  // namespace cgpt

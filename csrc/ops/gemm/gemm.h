// y = activation(x W^T + scale u v^T + bias) + residual: the contract that every backend's gemm
// keeps.
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
  for (const auto& [name, t] : {std::pair{"x", &a.x},
                                {"weight", &a.weight},
                                {"bias", &a.bias},
                                {"residual", &a.residual},
                                {"y", &a.y}})
    c.dense_rows(name, *t);
  low_rank_check(c, a.low_rank, M, N, a.x.dtype);
}

}  // namespace cgpt
#endif

namespace cgpt {
CGPT_CPU_ENTRY(gemm_fwd, GemmArgs)
}  // namespace cgpt

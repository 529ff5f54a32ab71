// The products of gemm on CUDA, forward and backward: one contract, because the gradients are
// products of the same matrices read along other strides.
#pragma once

#include "gemm.h"

namespace cgpt {

// y = activation(a b^T + bias) + residual
struct GemmProductArgs {
  TensorView a;         // [M, K], T in fp32, bf16, fp16; a stride of 1 in one dimension
  TensorView b;         // [N, K] T, likewise
  TensorView bias;      // [N], T or fp32, or none
  TensorView residual;  // [M, N] T, or none; may be y itself
  TensorView y;         // [M, N] T
  TensorView pre;       // [M, N] T, or none: receives the values before the activation, which is
                        // then applied to those rounded values
  Activation activation = Activation::none;
};

// g = dy * activation'(pre), dbias = sum of g over rows: one pass over dy and pre.
struct GemmActivationBwdArgs {
  TensorView dy;      // [M, N] T
  TensorView pre;     // [M, N] T, or none without an activation
  TensorView g;       // [M, N] T, or none without an activation: then g is dy
  TensorView shares;  // [gemm_bwd_shares(M), N] fp32, workspace; none where dbias is
  TensorView dbias;   // [N], T or fp32, or none
  Activation activation = Activation::none;
};

// Rows of dy whose sum one block leaves as its share of dbias.
constexpr int kGemmShareRows = 64;
inline int64_t gemm_bwd_shares(int64_t M) { return (M + kGemmShareRows - 1) / kGemmShareRows; }

inline void gemm_product_check(const GemmProductArgs& p, Device device) {
  const Checker c{"gemm", device};
  c.require(p.a && p.a.ndim == 2, "x must have shape (M, K)");
  c.require(p.y && p.y.ndim == 2, "y must have shape (M, N)");
  const int64_t M = p.a.shape[0], K = p.a.shape[1], N = p.y.shape[1];
  c.floating("x", p.a);
  const auto matrix = [&](const char* name, const TensorView& t, int64_t rows, int64_t columns) {
    c.tensor(name, t, {rows, columns});
    c.dtype(name, t, {p.a.dtype});
  };
  const auto one_stride = [&](const char* name, const TensorView& t) {
    c.require(t.shape[0] <= 1 || t.shape[1] <= 1 || t.strides[0] == 1 || t.strides[1] == 1,
              [&] { return std::string(name) + " must have a stride of 1 in one dimension"; });
  };
  matrix("x", p.a, M, K);
  one_stride("x", p.a);
  matrix("weight", p.b, N, K);
  one_stride("weight", p.b);
  if (p.bias) {
    c.tensor("bias", p.bias, {N});
    c.dtype("bias", p.bias, {p.a.dtype, DType::f32});
    c.dense_rows("bias", p.bias);
  }
  for (const auto& [name, t] : {std::pair{"residual", &p.residual}, {"y", &p.y}, {"pre", &p.pre}}) {
    if (!*t) continue;
    matrix(name, *t, M, N);
    c.dense_rows(name, *t);
  }
}

inline void gemm_activation_bwd_check(const GemmActivationBwdArgs& p, Device device) {
  const Checker c{"gemm_bwd", device};
  c.require(p.dy && p.dy.ndim == 2, "dy must have shape (M, N)");
  const int64_t M = p.dy.shape[0], N = p.dy.shape[1];
  c.floating("dy", p.dy);
  const bool acts = p.activation != Activation::none;
  c.require(acts == static_cast<bool>(p.pre) && acts == static_cast<bool>(p.g),
            "pre and g belong to an activation");
  for (const auto& [name, t] : {std::pair{"dy", &p.dy}, {"pre", &p.pre}, {"g", &p.g}}) {
    if (!*t) continue;
    c.tensor(name, *t, {M, N});
    c.dtype(name, *t, {p.dy.dtype});
    c.dense_rows(name, *t);
  }
  c.require(static_cast<bool>(p.shares) == static_cast<bool>(p.dbias),
            "shares and dbias come together");
  if (!p.dbias) return;
  c.tensor("shares", p.shares, {gemm_bwd_shares(M), N});
  c.dtype("shares", p.shares, {DType::f32});
  c.require(p.shares.shape[0] <= 1 || p.shares.strides[0] == N, "shares must be contiguous");
  c.dense_rows("shares", p.shares);
  c.tensor("dbias", p.dbias, {N});
  c.dtype("dbias", p.dbias, {p.dy.dtype, DType::f32});
  c.dense_rows("dbias", p.dbias);
}

void gemm_product_cuda(const GemmProductArgs& args);
void gemm_activation_bwd_cuda(const GemmActivationBwdArgs& args);

// Makes a product of 16-bit factors on Hopper's own instructions and returns true, or does nothing
// and returns false (gemm_hopper.cu). For TMA: all matrices aligned to 16 bytes, as are their
// lines, and sizes along lines multiples of 8; dense_a, dense_b: whether lines run along K.
bool gemm_product_hopper(const GemmProductArgs& args, bool dense_a, bool dense_b);

}  // namespace cgpt

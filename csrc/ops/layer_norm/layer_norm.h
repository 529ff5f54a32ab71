// y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension, optionally after adding
// a residual, and the gradients: the contract that every backend's layer_norm keeps.
#pragma once

#include "../../common/tensor_view.h"
#include "../../cpu/dispatch.h"

namespace cgpt {

struct LayerNormArgs {
  TensorView x;         // [rows, C], T in fp32, bf16, fp16; any row stride
  TensorView residual;  // [rows, C] T, or none
  TensorView weight;    // [C], T or fp32
  TensorView bias;      // [C], weight's dtype, or none
  TensorView y;         // [rows, C] T
  TensorView sum;       // [rows, C] T: x + residual as rounded to T; given exactly with residual
  TensorView mean;      // [rows] fp32, or none
  TensorView rstd;      // [rows] fp32, or none
  float eps = 1e-5f;
};

// xhat = (x - mean) * rstd, g = dy * weight: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),
// dweight = sum over rows of dy * xhat, dbias of dy. Each of the three may be absent.
struct LayerNormBwdArgs {
  TensorView dy;        // [rows, C] T, any row stride
  TensorView dtotal;    // [rows, C] T, added to dx before it is rounded; or none
  TensorView x;         // [rows, C] T: what was normalised, the sum where there was a residual
  TensorView weight;    // [C], T or fp32
  TensorView mean;      // [rows] fp32
  TensorView rstd;      // [rows] fp32
  TensorView dx;        // [rows, C] T
  TensorView dweight;   // [C], weight's dtype
  TensorView dbias;     // [C], T or fp32
  TensorView shares{};  // CUDA: [2, layer_norm_bwd_shares(rows), C] fp32 to work in, dense
};

}  // namespace cgpt

#ifndef CGPT_TIER
  #include "../../common/check.h"

namespace cgpt {

inline void layer_norm_check(const LayerNormArgs& a, Device device = Device::cpu) {
  const Checker c{"layer_norm", device};
  c.require(a.x && a.x.ndim == 2, "x must have shape (rows, C)");
  const int64_t rows = a.x.shape[0], C = a.x.shape[1];
  c.tensor("x", a.x, {rows, C});
  c.floating("x", a.x);
  c.tensor("weight", a.weight, {C});
  c.dtype("weight", a.weight, {a.x.dtype, DType::f32});
  if (a.bias) {
    c.tensor("bias", a.bias, {C});
    c.dtype("bias", a.bias, {a.weight.dtype});
  }
  c.tensor("y", a.y, {rows, C});
  c.dtype("y", a.y, {a.x.dtype});
  c.require(static_cast<bool>(a.residual) == static_cast<bool>(a.sum),
            "residual and sum must be given together");
  if (a.residual) {
    c.tensor("residual", a.residual, {rows, C});
    c.tensor("sum", a.sum, {rows, C});
    c.dtype("residual", a.residual, {a.x.dtype});
    c.dtype("sum", a.sum, {a.x.dtype});
  }
  for (const TensorView* stat : {&a.mean, &a.rstd})
    if (*stat) {
      c.tensor(stat == &a.mean ? "mean" : "rstd", *stat, {rows});
      c.dtype(stat == &a.mean ? "mean" : "rstd", *stat, {DType::f32});
    }
  for (const auto& [name, t] : {std::pair{"x", &a.x},
                                {"residual", &a.residual},
                                {"weight", &a.weight},
                                {"bias", &a.bias},
                                {"y", &a.y},
                                {"sum", &a.sum},
                                {"mean", &a.mean},
                                {"rstd", &a.rstd}})
    c.dense_rows(name, *t);
}

// Blocks of rows whose shares of dweight and dbias are added up at the end: a constant, so that the
// same sums come out on every device.
inline int64_t layer_norm_bwd_shares(int64_t rows) {
  constexpr int64_t kMost = 256, kFewestRows = 8;
  const int64_t shares = (rows + kFewestRows - 1) / kFewestRows;
  return shares < kMost ? shares : kMost;
}

inline void layer_norm_bwd_check(const LayerNormBwdArgs& a, Device device = Device::cpu) {
  const Checker c{"layer_norm_bwd", device};
  c.require(a.x && a.x.ndim == 2, "x must have shape (rows, C)");
  const int64_t rows = a.x.shape[0], C = a.x.shape[1];
  c.floating("x", a.x);
  for (const auto& [name, t] :
       {std::pair{"dy", &a.dy}, {"x", &a.x}, {"dtotal", &a.dtotal}, {"dx", &a.dx}}) {
    if ((t == &a.dtotal || t == &a.dx) && !*t) continue;
    c.tensor(name, *t, {rows, C});
    c.dtype(name, *t, {a.x.dtype});
    c.dense_rows(name, *t);
  }
  for (const auto& [name, t] : {std::pair{"mean", &a.mean}, {"rstd", &a.rstd}}) {
    c.tensor(name, *t, {rows});
    c.dtype(name, *t, {DType::f32});
    c.dense_rows(name, *t);
  }
  c.tensor("weight", a.weight, {C});
  c.dtype("weight", a.weight, {a.x.dtype, DType::f32});
  for (const auto& [name, t] :
       {std::pair{"weight", &a.weight}, {"dweight", &a.dweight}, {"dbias", &a.dbias}}) {
    if (t != &a.weight && !*t) continue;
    c.tensor(name, *t, {C});
    c.dtype(name, *t, {a.x.dtype, DType::f32});
    c.dense_rows(name, *t);
  }
}

inline void layer_norm_bwd_shares_check(const LayerNormBwdArgs& a, Device device) {
  if (!a.dweight && !a.dbias) return;
  const Checker c{"layer_norm_bwd", device};
  const int64_t C = a.x.shape[1], shares = layer_norm_bwd_shares(a.x.shape[0]);
  c.tensor("shares", a.shares, {2, shares, C});
  c.dtype("shares", a.shares, {DType::f32});
  c.require(a.shares.numel() == 0 || (a.shares.strides[2] == 1 && a.shares.strides[1] == C &&
                                      a.shares.strides[0] == shares * C),
            "shares must be dense");
}

}  // namespace cgpt
#endif

namespace cgpt {
CGPT_CPU_ENTRY(layer_norm_fwd, LayerNormArgs)
CGPT_CPU_ENTRY(layer_norm_bwd, LayerNormBwdArgs)
void layer_norm_fwd_cuda(const LayerNormArgs& args);  // where CUDA sources are built
void layer_norm_bwd_cuda(const LayerNormBwdArgs& args);
}  // namespace cgpt

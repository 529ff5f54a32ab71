// y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension, optionally after adding
// a residual: the contract that every backend's layer_norm keeps.
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

}  // namespace cgpt
#endif

namespace cgpt {
CGPT_CPU_ENTRY(layer_norm_fwd, LayerNormArgs)
void layer_norm_fwd_cuda(const LayerNormArgs& args);  // where CUDA sources are built
}  // namespace cgpt

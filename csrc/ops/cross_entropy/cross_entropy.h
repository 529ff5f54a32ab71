// loss[i] = (1 - s) (lse[i] - z[i, target[i]]) + s (lse[i] - mean_v z[i, v]), z = x W^T + bias,
// lse[i] = log sum_v exp z[i, v]: the language-model head and its cross-entropy in one, s being the
// label smoothing. The contract that every backend's linear_cross_entropy keeps.
#pragma once

#include "../../common/tensor_view.h"
#include "../../cpu/dispatch.h"

namespace cgpt {

struct LinearCrossEntropyArgs {
  TensorView x;       // [M, K], T in fp32, bf16, fp16; any row stride
  TensorView weight;  // [V, K] T, any row stride
  TensorView bias;    // [V], T or fp32, or none
  TensorView target;  // [M] int64, any stride; in [0, V) or ignore_index
  TensorView loss;    // [M] fp32, 0 where the target is ignore_index
  TensorView lse;     // [M] fp32, of every row, or none
  int64_t ignore_index = -100;
  float label_smoothing = 0.0f;

  // For linear_cross_entropy_grads; each of the gradients may be absent.
  TensorView drows = {};  // [M] fp32, any stride: gradient of each row's loss; or none, then it is
  float scale = 1.0f;     // this for every row that counts
  TensorView dx = {};     // [M, K] T, any row stride; 0 where the target is ignore_index
  TensorView dweight = {};  // [V, K] T, any row stride
  TensorView dbias = {};    // [V], bias's dtype
};

}  // namespace cgpt

#ifndef CGPT_TIER
  #include "../../common/check.h"

namespace cgpt {

// Shapes, dtypes and the label smoothing. The targets' values are checked apart: they are in
// another memory on another device.
inline void linear_cross_entropy_check(const LinearCrossEntropyArgs& a,
                                       Device device = Device::cpu) {
  const Checker c{"linear_cross_entropy", device};
  c.require(a.x && a.x.ndim == 2, "x must have shape (M, K)");
  c.require(a.weight && a.weight.ndim == 2, "weight must have shape (V, K)");
  const int64_t M = a.x.shape[0], K = a.x.shape[1], V = a.weight.shape[0];
  c.tensor("x", a.x, {M, K});
  c.floating("x", a.x);
  c.tensor("weight", a.weight, {V, K});
  c.dtype("weight", a.weight, {a.x.dtype});
  c.require(V > 0 || M == 0,
            [&] { return "weight must have at least one row, got shape " + shape_text(a.weight); });
  if (a.bias) {
    c.tensor("bias", a.bias, {V});
    c.dtype("bias", a.bias, {a.x.dtype, DType::f32});
  }
  c.tensor("target", a.target, {M});
  c.dtype("target", a.target, {DType::i64});
  c.tensor("loss", a.loss, {M});
  c.dtype("loss", a.loss, {DType::f32});
  if (a.lse) {
    c.tensor("lse", a.lse, {M});
    c.dtype("lse", a.lse, {DType::f32});
  }
  if (a.drows) {
    c.tensor("drows", a.drows, {M});
    c.dtype("drows", a.drows, {DType::f32});
  }
  const auto gradient = [&](const char* name, const TensorView& g, const TensorView& of) {
    if (!g) return;
    if (of.ndim == 1) c.tensor(name, g, {of.shape[0]});
    else c.tensor(name, g, {of.shape[0], of.shape[1]});
    c.dtype(name, g, {of.dtype});
    c.dense_rows(name, g);
  };
  gradient("dx", a.dx, a.x);
  gradient("dweight", a.dweight, a.weight);
  c.require(a.bias || !a.dbias, "dbias must be None where there is no bias");
  gradient("dbias", a.dbias, a.bias);
  c.dense_rows("x", a.x);
  c.dense_rows("weight", a.weight);
  c.dense_rows("bias", a.bias);
  c.dense_rows("loss", a.loss);
  c.dense_rows("lse", a.lse);
  c.require(a.label_smoothing >= 0.0f && a.label_smoothing <= 1.0f, [&] {
    return "label_smoothing must be in [0, 1], got " + std::to_string(a.label_smoothing);
  });
}

inline void linear_cross_entropy_check_targets(const LinearCrossEntropyArgs& a) {
  const int64_t M = a.x.shape[0], V = a.weight.shape[0];
  for (int64_t i = 0; i < M; ++i) {
    const int64_t t = a.target.as<const int64_t>()[i * a.target.strides[0]];
    if (t == a.ignore_index || (t >= 0 && t < V)) continue;
    fail("linear_cross_entropy: target[" + std::to_string(i) + "] must be in [0, " +
         std::to_string(V) + ") or ignore_index = " + std::to_string(a.ignore_index) + ", got " +
         std::to_string(t));
  }
}

// The sum of the finished losses, or their mean over the rows that count (NaN where none does);
// added in double, in order.
inline float linear_cross_entropy_reduce(const LinearCrossEntropyArgs& a, bool mean) {
  double sum = 0.0;
  int64_t count = 0;
  for (int64_t i = 0; i < a.loss.shape[0]; ++i) {
    sum += a.loss.as<const float>()[i];
    count += a.target.as<const int64_t>()[i * a.target.strides[0]] != a.ignore_index;
  }
  return static_cast<float>(mean ? sum / static_cast<double>(count) : sum);
}

}  // namespace cgpt
#endif

namespace cgpt {
CGPT_CPU_ENTRY(linear_cross_entropy_fwd, LinearCrossEntropyArgs)
CGPT_CPU_ENTRY(linear_cross_entropy_grads, LinearCrossEntropyArgs)
}  // namespace cgpt

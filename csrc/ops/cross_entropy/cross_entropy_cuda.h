// What the CUDA kernels of linear_cross_entropy take beyond the op's contract: memory to work in.
#pragma once

#include "cross_entropy.h"

namespace cgpt {

// Rows and classes of one tile, and the pieces the vocabulary is cut into: functions of the shape
// alone, so that the same sums come out on every device.
constexpr int64_t kLogitRows = 128, kLogitColumns = 128;
inline int64_t linear_cross_entropy_chunk(int64_t V) {
  constexpr int64_t kMostChunks = 64;
  const int64_t tiles = (V + kLogitColumns - 1) / kLogitColumns;
  const int64_t each = (tiles + kMostChunks - 1) / kMostChunks;
  return (each > 0 ? each : 1) * kLogitColumns;
}
// Rows of the workspace of the forward, [parts, M] fp32: maximum, sum and total of each chunk, then
// the logit of the target.
inline int64_t linear_cross_entropy_parts(int64_t V) {
  const int64_t chunk = linear_cross_entropy_chunk(V);
  return 3 * ((V + chunk - 1) / chunk) + 1;
}
// Rows of `shares`, [count, V] fp32, for the sums over M rows that dbias is made of.
inline int64_t linear_cross_entropy_shares(int64_t M) { return (M + kLogitRows - 1) / kLogitRows; }

// g = drows * (softmax(logits) - (1 - s) * onehot(target) - s / V), 0 where the target is ignored.
struct LogitGradientArgs {
  LinearCrossEntropyArgs op;  // lse as the forward left it; loss is not used
  TensorView drows;           // [M] fp32
  TensorView g;               // [M, V] T, rows on multiples of 16 bytes
  TensorView shares;  // [linear_cross_entropy_shares(M), V] fp32: its sums over rows; or none
};

inline void logit_gradient_check(const LogitGradientArgs& a, Device device) {
  const Checker c{"linear_cross_entropy_bwd", device};
  LinearCrossEntropyArgs op = a.op;
  op.loss = op.lse;
  linear_cross_entropy_check(op, device);
  const int64_t M = op.x.shape[0], V = op.weight.shape[0];
  c.tensor("lse", op.lse, {M});
  c.tensor("drows", a.drows, {M});
  c.dtype("drows", a.drows, {DType::f32});
  c.dense_rows("drows", a.drows);
  c.tensor("g", a.g, {M, V});
  c.dtype("g", a.g, {op.x.dtype});
  c.dense_rows("g", a.g);
  if (a.shares) {
    c.tensor("shares", a.shares, {linear_cross_entropy_shares(M), V});
    c.dtype("shares", a.shares, {DType::f32});
    c.dense_rows("shares", a.shares);
  }
}

void linear_cross_entropy_fwd_cuda(const LinearCrossEntropyArgs& args, const TensorView& parts);
void linear_cross_entropy_logit_gradient_cuda(const LogitGradientArgs& args);
// dbias, of its own dtype, from the shares of all rows: [count, V] fp32, dense.
void linear_cross_entropy_dbias_cuda(const TensorView& shares, const TensorView& dbias);

}  // namespace cgpt

// out = dropout(softmax(q k^T * scale + bias - alibi)) v, masked keys left out: the contract that
// every backend's attention keeps.
//
// Letters: B batch, H heads, S_q queries, S_k keys, D head size; i a query, j a key. Key j is
// visible to query i under `causal` iff j <= i + S_k - S_q.
#pragma once

#include "../../common/tensor_view.h"
#include "../../cpu/dispatch.h"

namespace cgpt {

struct AttentionArgs {
  TensorView q;                 // [B, H, S_q, D], T in fp32, bf16, fp16; any strides but the last
  TensorView k;                 // [B, H, S_k, D] T
  TensorView v;                 // [B, H, S_k, D] T
  TensorView key_padding_mask;  // [B, S_k] bool, true = ignored; or none
  TensorView attn_bias;         // [B, H, S_q, S_k], T or fp32: added; bool: true keeps; or none
  TensorView alibi_slopes;      // [H] fp32, logits -= slope * |i + S_k - S_q - j|; or none
  TensorView out;               // [B, H, S_q, D] T; rows that see no key are 0
  TensorView lse;               // [B, H, S_q] fp32: log(sum(exp(logits))), -inf there; or none
  float scale = 1.0f;
  bool causal = true;
  double dropout_p = 0.0;  // in [0, 1]; see csrc/cpu/philox.h for which elements it drops
  uint64_t seed = 0;
  TensorView row_stats;  // [B, H, S_q, 2] fp32: each row's largest logit and sum of exponentials,
                         // for the backward of the same tier; or none
  // [B, H, S_k] fp32, or none: k and v are int8, each row times its scale (int8_rows.h). Forward
  // only.
  TensorView k_scale{}, v_scale{};
};

// Keys or values into an int8 cache: rows, scales = x.
struct AttentionQuantizeArgs {
  TensorView x;       // [B, H, S, D] T in fp32, bf16, fp16
  TensorView rows;    // [B, H, S, D] int8
  TensorView scales;  // [B, H, S] fp32
};

// Gradients: dv = P~^T dout, dlogits = P * (dP - sum_j P dP), dq = scale * dlogits k,
// dk = scale * dlogits^T q, P~ the dropped probabilities. Rows that see no key have gradient 0.
struct AttentionBwdArgs {
  // As the forward had it, out and row_stats as it left them. Without row_stats, which only the
  // forward beside this leaves, they are taken anew; lse is not used.
  AttentionArgs fwd;
  TensorView dout;   // [B, H, S_q, D] T
  TensorView dq;     // [B, H, S_q, D] T
  TensorView dk;     // [B, H, S_k, D] T
  TensorView dv;     // [B, H, S_k, D] T
  TensorView dbias;  // T or fp32, sizes as attn_bias's or 1, where its gradient is summed; or none
};

}  // namespace cgpt

#ifndef CGPT_TIER
  #include "../../common/check.h"

namespace cgpt {

inline void attention_check(const AttentionArgs& a, Device device = Device::cpu) {
  const Checker c{"attention", device};
  c.require(a.q && a.q.ndim == 4, "q must have shape (B, H, S_q, D)");
  c.require(a.k && a.k.ndim == 4, "k must have shape (B, H, S_k, D)");
  const int64_t B = a.q.shape[0], H = a.q.shape[1], S_q = a.q.shape[2], D = a.q.shape[3];
  const int64_t S_k = a.k.shape[2];
  c.require(D >= 1, "q must have a head size D of at least 1");
  c.tensor("q", a.q, {B, H, S_q, D});
  c.tensor("k", a.k, {B, H, S_k, D});
  c.tensor("v", a.v, {B, H, S_k, D});
  c.tensor("out", a.out, {B, H, S_q, D});
  c.floating("q", a.q);
  c.require(bool(a.k_scale) == bool(a.v_scale), "k_scale and v_scale come together");
  for (const auto& [name, t] : {std::pair{"k_scale", &a.k_scale}, {"v_scale", &a.v_scale}}) {
    if (!*t) continue;
    c.tensor(name, *t, {B, H, S_k});
    c.dtype(name, *t, {DType::f32});
    c.dense_rows(name, *t);
  }
  c.dtype("out", a.out, {a.q.dtype});
  for (const auto& [name, t] : {std::pair{"k", &a.k}, {"v", &a.v}})
    c.dtype(name, *t, {a.k_scale ? DType::i8 : a.q.dtype});
  for (const auto& [name, t] : {std::pair{"q", &a.q}, {"k", &a.k}, {"v", &a.v}, {"out", &a.out}})
    c.dense_rows(name, *t);
  if (a.key_padding_mask) {
    c.tensor("key_padding_mask", a.key_padding_mask, {B, S_k});
    c.dtype("key_padding_mask", a.key_padding_mask, {DType::boolean});
  }
  if (a.attn_bias) {
    c.tensor("attn_bias", a.attn_bias, {B, H, S_q, S_k});
    c.dtype("attn_bias", a.attn_bias, {a.q.dtype, DType::f32, DType::boolean});
  }
  if (a.alibi_slopes) {
    c.tensor("alibi_slopes", a.alibi_slopes, {H});
    c.dtype("alibi_slopes", a.alibi_slopes, {DType::f32});
    c.dense_rows("alibi_slopes", a.alibi_slopes);
  }
  if (a.lse) {
    c.tensor("lse", a.lse, {B, H, S_q});
    c.dtype("lse", a.lse, {DType::f32});
  }
  if (a.row_stats) {
    c.tensor("row_stats", a.row_stats, {B, H, S_q, 2});
    c.dtype("row_stats", a.row_stats, {DType::f32});
  }
  if (!(a.dropout_p >= 0.0 && a.dropout_p <= 1.0))
    fail("attention: dropout_p must be in [0, 1], got " + std::to_string(a.dropout_p));
}

inline void attention_bwd_check(const AttentionBwdArgs& a, Device device = Device::cpu) {
  attention_check(a.fwd, device);
  const Checker c{"attention", device};
  const AttentionArgs& f = a.fwd;
  c.require(!f.k_scale, "keys and values in int8 have no gradient");
  const auto like = [&](const char* name, const TensorView& t, const TensorView& model) {
    c.tensor(name, t, {model.shape[0], model.shape[1], model.shape[2], model.shape[3]});
    c.dtype(name, t, {model.dtype});
    c.dense_rows(name, t);
  };
  like("dout", a.dout, f.q);
  like("dq", a.dq, f.q);
  like("dk", a.dk, f.k);
  like("dv", a.dv, f.v);
  if (!a.dbias) return;
  c.require(f.attn_bias && f.attn_bias.dtype != DType::boolean,
            "dbias needs an attn_bias that is added");
  c.dtype("dbias", a.dbias, {f.attn_bias.dtype});
  c.require(a.dbias.ndim == 4, "dbias must have 4 dimensions");
  for (int d = 0; d < 4; ++d)
    c.require(a.dbias.shape[d] == f.attn_bias.shape[d] || a.dbias.shape[d] == 1,
              "dbias must have the sizes of attn_bias or 1");
}

}  // namespace cgpt
#endif

namespace cgpt {
CGPT_CPU_ENTRY(attention_fwd, AttentionArgs)
CGPT_CPU_ENTRY(attention_bwd, AttentionBwdArgs)
CGPT_CPU_ENTRY(attention_quantize, AttentionQuantizeArgs)
}  // namespace cgpt

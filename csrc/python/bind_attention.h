#pragma once

#include "../ops/attention/attention.h"
#include "dlpack.h"
#include "gil.h"

namespace cgpt::python {
namespace {

void attention_fwd(Tensor q, Tensor k, Tensor v, Tensor key_padding_mask, Tensor attn_bias,
                   Tensor alibi_slopes, Tensor out, Tensor lse, float scale, bool causal,
                   double dropout_p, uint64_t seed, Tensor row_stats) {
  const AttentionArgs args{q,   k,     v,      key_padding_mask, attn_bias, alibi_slopes, out,
                           lse, scale, causal, dropout_p,        seed,      row_stats};
  attention_check(args);
  const ReleaseGil release(args.q.numel() * args.k.shape[2] * 2);
  attention_fwd_cpu(args);
}

void attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor row_stats,
                   Tensor key_padding_mask, Tensor attn_bias, Tensor alibi_slopes, Tensor dq,
                   Tensor dk, Tensor dv, Tensor dbias, float scale, bool causal, double dropout_p,
                   uint64_t seed) {
  const AttentionBwdArgs args{{q, k, v, key_padding_mask, attn_bias, alibi_slopes, out,
                               TensorView{}, scale, causal, dropout_p, seed, row_stats},
                              dout,
                              dq,
                              dk,
                              dv,
                              dbias};
  attention_bwd_check(args);
  const ReleaseGil release(args.fwd.q.numel() * args.fwd.k.shape[2] * 5);
  attention_bwd_cpu(args);
}

}  // namespace

inline void bind_attention(py::module_& m) {
  using py::arg;
  m.def("attention_fwd", &attention_fwd, arg("q"), arg("k"), arg("v"), arg("key_padding_mask"),
        arg("attn_bias"), arg("alibi_slopes"), arg("out"), arg("lse"), arg("scale"), arg("causal"),
        arg("dropout_p"), arg("seed"), arg("row_stats") = py::none());
  m.def("attention_bwd", &attention_bwd);
}

}  // namespace cgpt::python

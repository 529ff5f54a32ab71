#pragma once

#include "../ops/attention/attention.h"
#include "dlpack.h"
#include "gil.h"

namespace cgpt::python {
namespace {

void attention_fwd(Tensor q, Tensor k, Tensor v, Tensor key_padding_mask, Tensor attn_bias,
                   Tensor alibi_slopes, Tensor out, Tensor lse, float scale, bool causal,
                   double dropout_p, uint64_t seed) {
  const AttentionArgs args{q,   k,   v,     key_padding_mask, attn_bias, alibi_slopes,
                           out, lse, scale, causal,           dropout_p, seed};
  attention_check(args);
  const ReleaseGil release(args.q.numel() * args.k.shape[2] * 2);
  attention_fwd_cpu(args);
}

}  // namespace

inline void bind_attention(py::module_& m) { m.def("attention_fwd", &attention_fwd); }

}  // namespace cgpt::python

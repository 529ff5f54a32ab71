#pragma once

#include "../ops/attention/attention_cuda.h"
#include "cuda.h"

namespace cgpt::python {

inline void bind_cuda_attention(py::module_& m) {
  m.def("attention_fwd_cuda", [](Tensor q, Tensor k, Tensor v, Tensor key_padding_mask,
                                 Tensor attn_bias, Tensor alibi_slopes, Tensor out, Tensor lse,
                                 float scale, bool causal, double dropout_p, uint64_t seed) {
    const AttentionArgs args{q,   k,   v,     key_padding_mask, attn_bias, alibi_slopes,
                             out, lse, scale, causal,           dropout_p, seed,
                             {}};
    attention_cuda_check(args, kCudaDevice);
    // Work space of the framework, whose allocator knows when the kernels that use it are done.
    const int64_t floats = attention_work(q.shape[2], k.shape[2], q.shape[3]);
    const int64_t each = q.dtype == DType::f32 ? 1 : 2;
    py::object work;
    py::detail::make_caster<BorrowedTensor> caster;
    if (floats) caster.load(work = new_empty(q, floats * each), true);
    const TensorView& room = static_cast<Tensor>(caster);
    py::gil_scoped_release release;
    attention_fwd_cuda(args, room.as<float>());
  });
  m.def("attention_bwd_cuda", [](Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                 Tensor key_padding_mask, Tensor attn_bias, Tensor alibi_slopes,
                                 Tensor dq, Tensor dk, Tensor dv, Tensor stats, Tensor dbias,
                                 float scale, bool causal, double dropout_p, uint64_t seed) {
    const AttentionGradArgs args{{q,
                                  k,
                                  v,
                                  key_padding_mask,
                                  attn_bias,
                                  alibi_slopes,
                                  out,
                                  lse,
                                  scale,
                                  causal,
                                  dropout_p,
                                  seed,
                                  {}},
                                 dout,
                                 dq,
                                 dk,
                                 dv,
                                 stats,
                                 dbias};
    attention_grad_check(args, kCudaDevice);
    py::gil_scoped_release release;
    attention_bwd_cuda(args);
  });
}

}  // namespace cgpt::python

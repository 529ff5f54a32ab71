"""attention on CUDA, beside what `attention_fwd_cuda` of csrc/ops/attention does by itself."""

import torch
from torch import Tensor

from ... import backends
from ..dispatch import dense_last

# Widest head: kAttentionWidest in csrc/ops/attention/attention_cuda.h.
WIDEST = 256


def unsupported(q: Tensor, *rest) -> str | None:
    """Why these kernels cannot take q, or None."""
    return f"heads are wider than {WIDEST}, got D = {q.shape[3]}" if q.shape[3] > WIDEST else None


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_padding_mask: Tensor | None,
    attn_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: int | Tensor | None,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the gradient of attn_bias (an empty tensor unless need_bias).

    Args:
        dout, q, out: [B, H, S_q, D] in T.   k, v: [B, H, S_k, D].   lse: [B, H, S_q], fp32.
        attn_bias: as passed by the user, not expanded: its gradient has its shape.
    """
    (B, H, S_q, _), S_k = q.shape, k.shape[2]
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:  # nothing sees anything
        dbias = attn_bias.new_zeros(attn_bias.shape) if need_bias else q.new_empty(0)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias
    q, k, v, dout = (dense_last(t) for t in (q, k, v, dout))
    slopes = None if alibi_slopes is None else dense_last(alibi_slopes)
    wide = bias = None
    if attn_bias is not None:
        bias = attn_bias.expand(B, H, S_q, S_k)
        four = (1,) * (4 - attn_bias.ndim) + tuple(attn_bias.shape)
        if need_bias:
            wide = q.new_empty((*four[:2], S_q, S_k), dtype=torch.float32)
    stats = q.new_empty((3, B, H, S_q), dtype=torch.float32)
    drawn = 0 if seed is None else int(seed)
    backends.cuda_kernels().attention_bwd_cuda(
        dout, q, k, v, out, lse, key_padding_mask, bias, slopes, dq, dk, dv, stats, wide,
        scale, causal, dropout_p, drawn,
    )  # fmt: skip
    if wide is None:
        return dq, dk, dv, q.new_empty(0)
    # what is shared along queries or keys is added up last
    return dq, dk, dv, wide.sum_to_size(four).view(attn_bias.shape).to(attn_bias.dtype)

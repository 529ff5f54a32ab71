"""Gradients of attention on the CPU, by the kernels of csrc/ops/attention/backward.h."""

import torch
from torch import Tensor

from ... import backends
from ..dispatch import dense_last


def like(t: Tensor) -> Tensor:
    """Fresh memory for the gradient of t, ordered as t is: for a view of a packed projection [B, S,
    3, H, D] that is [B, S, H, D], whose rows the gradient of the projection takes as they lie."""
    grad = torch.empty_like(t)
    if grad.stride(3) != 1:  # t is expanded or transposed at its end
        grad = torch.empty_like(t, memory_format=torch.contiguous_format)
    return grad


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    row_stats: Tensor | None,
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
        dout, q, out: [B, H, S_q, D] in T.   k, v: [B, H, S_k, D].
        row_stats: [B, H, S_q, 2], fp32, as the cpu kernel's forward left it; None has it taken
            anew, for 1.4 times the operations.
        attn_bias: as passed by the user, not expanded: its gradient has its shape.
    """
    dout, q, k, v, out = (dense_last(t) for t in (dout, q, k, v, out))
    dq, dk, dv = like(q), like(k), like(v)
    dbias, sums = q.new_empty(0), None
    if attn_bias is not None:
        if need_bias:
            dbias = attn_bias.new_empty(attn_bias.shape)
            sums = dbias.view((1,) * (4 - dbias.ndim) + dbias.shape)
        attn_bias = attn_bias.expand(*q.shape[:3], k.shape[2])
    if key_padding_mask is not None:
        key_padding_mask = dense_last(key_padding_mask)
    if alibi_slopes is not None:
        alibi_slopes = dense_last(alibi_slopes)
    backends._C.attention_bwd(
        dout, q, k, v, out, row_stats, key_padding_mask, attn_bias, alibi_slopes, dq, dk, dv, sums,
        scale, causal, dropout_p, 0 if seed is None else int(seed),
    )  # fmt: skip
    return dq, dk, dv, dbias

"""Attention in plain PyTorch: what every backend is held to. It holds S_q x S_k matrices.

Vaswani et al., "Attention is all you need", arXiv 1706.03762, section 3.2.1;
ALiBi: Press, Smith, Lewis, arXiv 2108.12409.

Letters: B batch, H heads, S_q queries, S_k keys, D head size; i query, j key, shift = S_k - S_q.
"""

import torch
from torch import Tensor

from ..philox import keep_mask


def visible_keys(
    q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_bias: Tensor | None, causal: bool
) -> Tensor | None:
    """Which keys a query may see, bool and broadcastable to [B, H, S_q, S_k]; None for all."""
    S_q, S_k = q.shape[2], k.shape[2]
    visible = None
    if causal:
        i = torch.arange(S_q, device=q.device)[:, None]
        j = torch.arange(S_k, device=q.device)
        visible = j <= i + (S_k - S_q)  # [S_q, S_k]
    if key_padding_mask is not None:
        real = ~key_padding_mask[:, None, None, :]  # [B, 1, 1, S_k]
        visible = real if visible is None else visible & real
    if attn_bias is not None and attn_bias.dtype == torch.bool:
        visible = attn_bias if visible is None else visible & attn_bias
    return visible


def masked_logits(
    q: Tensor,
    k: Tensor,
    key_padding_mask: Tensor | None,
    attn_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """q k^T * scale + attn_bias - slope * |i + shift - j|, -inf where masked; fp32 at least.

    Returns:
        [B, H, S_q, S_k].
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    S_q, S_k = q.shape[2], k.shape[2]
    logits = (q @ k.transpose(-1, -2)).to(wide) * scale
    if attn_bias is not None and attn_bias.dtype != torch.bool:
        logits = logits + attn_bias
    if alibi_slopes is not None:
        i = torch.arange(S_q, device=q.device)[:, None] + (S_k - S_q)
        distance = (i - torch.arange(S_k, device=q.device)).abs()  # [S_q, S_k]
        logits = logits - alibi_slopes.to(wide)[:, None, None] * distance
    visible = visible_keys(q, k, key_padding_mask, attn_bias, causal)
    return logits if visible is None else logits.masked_fill(~visible, float("-inf"))


def dropout_mask(q: Tensor, k: Tensor, dropout_p: float, seed: int | Tensor) -> Tensor:
    """Which probabilities survive, bool [B, H, S_q, S_k]: element e counts through it in order."""
    B, H, S_q, _ = q.shape
    shape = (B, H, S_q, k.shape[2])
    return keep_mask(0, B * H * S_q * k.shape[2], dropout_p, seed, q.device).view(shape)


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    attn_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: int | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out = dropout(softmax(logits)) v, and lse = log(sum(exp(logits))), row by row.

    A row that sees no key (mask, or a bias of -inf throughout) gives out = 0 and lse = -inf.

    Returns:
        out [B, H, S_q, D] in the dtype of q; lse [B, H, S_q], fp32 at least.
    """
    logits = masked_logits(q, k, key_padding_mask, attn_bias, alibi_slopes, scale, causal)
    lse = torch.logsumexp(logits.detach(), -1)
    blind = torch.isneginf(logits).all(-1, keepdim=True)  # [B, H, S_q, 1]
    # softmax of a row of -inf is NaN, in the forward and through the gradient: give such rows
    # zeros to chew on and drop what comes out.
    p = torch.softmax(logits.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    if dropout_p > 0.0:
        p = p * dropout_mask(q, k, dropout_p, seed) / (1.0 - dropout_p)
    return p.to(v.dtype) @ v, lse

"""Gradients of attention, a slab of whole rows of probabilities at a time.

P = softmax(logits), its dropout mask drawn again from the seed:
dv = P~^T do,  dP = (do v^T) * mask / (1 - p),  dlogits = P * (dP - sum_j P dP),
dq = scale * dlogits k,  dk = scale * dlogits^T q,  dbias = dlogits summed over what was broadcast
(Dao et al., "FlashAttention", arXiv 2205.14135, appendix B.2).

Neither the saved output nor the log-sum-exp is used: sum(do * out) with an output rounded to bf16
leaves dlogits whose rows do not sum to 0, and exp(logits - lse) is 1 instead of 1 / S_k in a row
masked throughout by finfo.min, where fp32 cannot hold lse = min + log(S_k).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .philox import keep_mask
from .reference import masked_logits

# Probabilities of one slab in fp32: 16 MB, a few of which stay in a server's last-level cache.
SLAB_ELEMENTS = 1 << 22


def _slabs(B: int, H: int, S_q: int, S_k: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of batch, head and query, each covering consecutive element indices."""
    if B * H * S_q * S_k <= SLAB_ELEMENTS:
        if B * H * S_q:
            yield slice(0, B), slice(0, H), slice(0, S_q)
        return
    heads = min(H, max(1, SLAB_ELEMENTS // (S_q * S_k)))
    queries = S_q if S_q * S_k <= SLAB_ELEMENTS else max(1, SLAB_ELEMENTS // S_k)
    for b in range(B):
        for h in range(0, H, heads):
            for i in range(0, S_q, queries):
                yield slice(b, b + 1), slice(h, min(h + heads, H)), slice(i, min(i + queries, S_q))


def _part(tensor: Tensor | None, *slices: slice) -> Tensor | None:
    """tensor cut by slices aligned to its last dimensions; dimensions of size 1 stay whole."""
    if tensor is None:
        return None
    slices = slices[len(slices) - tensor.ndim :]
    return tensor[
        tuple(
            slice(None) if size == 1 else cut
            for size, cut in zip(tensor.shape, slices, strict=True)
        )
    ]


def attention_bwd(
    dout: Tensor,
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
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the gradient of attn_bias (an empty tensor unless need_bias).

    Args:
        dout, q: [B, H, S_q, D] in T.   k, v: [B, H, S_k, D].
        attn_bias: as passed by the user, not expanded: its gradient has its shape.
    """
    (B, H, S_q, _), S_k = q.shape, k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.zeros(k.shape, dtype=wide, device=k.device)
    dv = torch.zeros(v.shape, dtype=wide, device=v.device)
    dbias = None
    if need_bias:
        dbias = torch.zeros(attn_bias.shape, dtype=wide, device=q.device)
    masked = (causal and S_q > S_k) or key_padding_mask is not None or attn_bias is not None
    for b, h, i in _slabs(B, H, S_q, S_k):
        # Under a causal mask the slab's last query sees nothing beyond key `last`.
        last = max(0, min(S_k, i.stop + S_k - S_q)) if causal else S_k
        j = slice(0, last)
        qs = q[b, h, i].to(wide)  # [b, h, i, D]
        ks, vs = k[b, h, j].to(wide), v[b, h, j].to(wide)  # [b, h, j, D]
        dos = dout[b, h, i].to(wide)
        # Causal mask and ALiBi count from the whole matrix's corner, so they are added below.
        logits = masked_logits(
            qs,
            ks,
            _part(key_padding_mask, b, j),
            _part(attn_bias, b, h, i, j),
            None,
            scale,
            False,
        )
        if causal or alibi_slopes is not None:
            at = torch.arange(i.start, i.stop, device=q.device)[:, None] + (S_k - S_q)
            offset = torch.arange(last, device=q.device) - at  # j - (i + shift)
            if alibi_slopes is not None:
                logits -= alibi_slopes[h].to(wide)[:, None, None] * offset.abs()
            if causal:
                logits.masked_fill_(offset > 0, float("-inf"))
        p = torch.softmax(logits, -1)  # [b, h, i, j]
        if masked:  # a row without a visible key has softmax NaN, gradient 0
            p.masked_fill_(torch.isneginf(logits).all(-1, keepdim=True), 0.0)
        dp = dos @ vs.transpose(-1, -2)
        dropped = p
        if dropout_p > 0.0:
            start = ((b.start * H + h.start) * S_q + i.start) * S_k
            shape = (*p.shape[:3], S_k)
            keep = keep_mask(start, p.shape[:3].numel() * S_k, dropout_p, seed, q.device)
            keep = keep.view(shape)[..., j] / (1.0 - dropout_p)
            dropped, dp = p * keep, dp * keep
        dv[b, h, j] += dropped.transpose(-1, -2) @ dos
        dlogits = p * dp  # then P * dP - P * delta
        dlogits.addcmul_(p, dlogits.sum(-1, keepdim=True), value=-1.0)
        if dbias is not None:
            into = _part(dbias, b, h, i, j)
            into += dlogits.sum_to_size(into.shape)
        dlogits *= scale
        dq[b, h, i] = (dlogits @ ks).to(q.dtype)
        dk[b, h, j] += dlogits.transpose(-1, -2) @ qs
    if dbias is None:
        dbias = q.new_empty(0)
    else:
        dbias = dbias.to(attn_bias.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias

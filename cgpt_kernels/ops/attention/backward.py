"""Gradients of attention, a slab of whole rows of probabilities at a time.

P = softmax(logits), its dropout mask drawn again from the seed:
dv = P~^T do,  dP = (do v^T) * mask / (1 - p),  dlogits = P * (dP - sum_j P dP),
dq = scale * dlogits k,  dk = scale * dlogits^T q,  dbias = dlogits summed over what was broadcast
(Dao et al., "FlashAttention", arXiv 2205.14135, appendix B.2).

Without bias, ALiBi and dropout ATen's tiled kernel does it from the saved out and lse, in 0.6 of
the time (111M, 512 tokens, 2 cores of a Zen 4). They do not serve in general: exp(logits - lse)
misses P by ulp(lse), 30 times eager's error in fp32 at logits of 100, and is 1 instead of 1 / S_k
in a row masked throughout by finfo.min, where fp32 cannot hold min + log(S_k); sum(do * out) with
an output rounded to bf16 leaves dlogits whose rows do not sum to 0, which the gradient of a bias
shows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...checks import LOW_PRECISION
from ..dispatch import dense_last
from .philox import keep_mask

# Probabilities of one slab in fp32: 512 kB, so that a slab and its gradient stay in a 1 MB L2. Of
# 2^16 .. 2^22, 2^17 was fastest at 12 heads x 512 x 512 causal, within 10 % at 48 x 256 x 256.
SLAB_ELEMENTS = 1 << 17


# ulp(16) / 2 is 1e-6, the slack that the numerics rule leaves an fp32 gradient.
EXACT_LSE = 16.0


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


def _hide_future(logits: Tensor, visible: int) -> None:
    """-inf beyond the keys that each query of a slab sees; its first query sees `visible` keys."""
    rows, start = logits.shape[-2], max(visible, 0)
    corner = logits[..., start:]  # row r sees visible - start + r of its columns
    future = torch.ones(rows, corner.shape[-1], dtype=torch.bool, device=logits.device)
    corner.masked_fill_(future.triu(visible - start), float("-inf"))


def _by_aten(q, k, lse, attn_bias, alibi_slopes, causal, dropout_p) -> bool:
    """Whether ATen's flash backward knows the case; its causal mask is aligned top-left."""
    plain = attn_bias is None and alibi_slopes is None and dropout_p == 0.0
    aligned = not causal or q.shape[2] in (1, k.shape[2])
    filled = q.numel() > 0 and k.shape[2] > 1  # of one key the weight is 1, to the last bit
    if not (plain and aligned and filled and q.is_cpu):
        return False
    if q.dtype == torch.float32:
        seen = lse.masked_fill(torch.isneginf(lse), 0.0)
        return seen.abs().max().item() <= EXACT_LSE
    return q.dtype in LOW_PRECISION


def _aten_bwd(dout, q, k, v, out, lse, key_padding_mask, scale, causal):
    # In fp32 whatever T is: the kernel adds up dk and dv in the dtype of its inputs, by blocks;
    # in bf16 that makes 4 times eager's error after 2048 queries and saves no time without AMX.
    # It reads rows of D as dense, whatever the last stride says.
    dout, q, k, v, out = (dense_last(t.float()) for t in (dout, q, k, v, out))
    mask = None
    if key_padding_mask is not None:
        mask = torch.zeros(key_padding_mask.shape, device=q.device)
        mask.masked_fill_(key_padding_mask, float("-inf"))
        # [B, S_k] -> [B, H, S_q, S_k], strides 0
        mask = mask[:, None, None, :].expand(*q.shape[:3], k.shape[2])
    # A blind row has lse = -inf, and exp(-inf - lse) shall be 0 there, not NaN.
    lse = lse.masked_fill(torch.isneginf(lse), float("inf"))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal and q.shape[2] > 1, attn_mask=mask, scale=scale
    )


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
    if _by_aten(q, k, lse, attn_bias, alibi_slopes, causal, dropout_p):
        grads = _aten_bwd(dout, q, k, v, out, lse, key_padding_mask, scale, causal)
        return (*(g.to(q.dtype).contiguous() for g in grads), q.new_empty(0))
    (B, H, S_q, _), S_k = q.shape, k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.zeros(k.shape, dtype=wide, device=k.device)
    dv = torch.zeros(v.shape, dtype=wide, device=v.device)
    dbias = None
    if need_bias:
        dbias = torch.zeros(attn_bias.shape, dtype=wide, device=q.device)
    for b, h, i in _slabs(B, H, S_q, S_k):
        # Under a causal mask the slab's last query sees nothing beyond key `last`.
        last = max(0, min(S_k, i.stop + S_k - S_q)) if causal else S_k
        j = slice(0, last)
        qs, dos = (t[b, h, i].to(wide).contiguous() for t in (q, dout))  # [b, h, i, D]
        ks, vs = (t[b, h, j].to(wide).contiguous() for t in (k, v))  # [b, h, j, D]
        logits = (qs @ ks.transpose(-1, -2)).mul_(scale)  # [b, h, i, j]
        bias = _part(attn_bias, b, h, i, j)
        if bias is not None and bias.dtype != torch.bool:
            logits += bias
        if alibi_slopes is not None:
            at = torch.arange(i.start, i.stop, device=q.device)[:, None] + (S_k - S_q)
            distance = (at - torch.arange(last, device=q.device)).abs()
            logits -= alibi_slopes[h].to(wide)[:, None, None] * distance
        if bias is not None and bias.dtype == torch.bool:
            logits.masked_fill_(~bias, float("-inf"))
        if key_padding_mask is not None:
            logits.masked_fill_(key_padding_mask[b, None, None, j], float("-inf"))
        if causal:
            _hide_future(logits, i.start + S_k - S_q + 1)
        p = torch.softmax(logits, -1)
        blind = torch.isneginf(lse[b, h, i])
        if blind.any():  # a row without a visible key has softmax NaN, gradient 0
            p.masked_fill_(blind[..., None], 0.0)
        dp = dos @ vs.transpose(-1, -2)
        dropped = p
        if dropout_p > 0.0:
            start = ((b.start * H + h.start) * S_q + i.start) * S_k
            keep = keep_mask(start, p.shape[:3].numel() * S_k, dropout_p, seed, q.device)
            keep = keep.view(*p.shape[:3], S_k)[..., j] / (1.0 - dropout_p)
            dropped, dp = p * keep, dp * keep
        dv[b, h, j] += dropped.transpose(-1, -2) @ dos
        dlogits = torch.ops.aten._softmax_backward_data(dp, p, -1, wide)  # P (dP - sum_j P dP)
        if dbias is not None:
            into = _part(dbias, b, h, i, j)
            into += dlogits.sum_to_size(into.shape)
        dq[b, h, i] = ((dlogits @ ks) * scale).to(q.dtype)
        dk[b, h, j] += (dlogits.transpose(-1, -2) @ qs) * scale
    if dbias is None:
        dbias = q.new_empty(0)
    else:
        dbias = dbias.to(attn_bias.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias

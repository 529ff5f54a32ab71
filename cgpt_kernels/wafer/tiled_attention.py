"""Attention tile by tile: what each core of a grid computes, and how a row of cores merges it.

Queries lie over the rows of cores, keys and values over the columns, in shares that differ by one
at most: in decode, with one query, that is how shifts keep the cache. A core's tile goes through
the CPU kernel, which leaves an output and, of each query, the largest logit and the sum of
exponentials over the core's own keys; a row of cores adds the outputs, weighted by these, in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import _C, _C_REASON
from .split import Piece, check_cover, cut


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    attn_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    grid: tuple[int, int],
) -> None:
    """Fills out and lse, as `_C.attention_fwd` with these arguments does.

    A checksum guards each merge: all keys must have been met once.
    """
    if _C is None:
        raise ImportError(_C_REASON)
    B, H, S, _ = q.shape
    keys = k.shape[2]
    shift = keys - S  # query i sees keys up to i + shift
    wide = q.float(), k.float(), v.float()
    for a, b in cut(S, min(grid[0], S)):
        top = torch.full((B, H, b - a), float("-inf"))
        total = torch.zeros(B, H, b - a)
        result = torch.zeros(B, H, b - a, q.shape[3])
        met = []
        for c, d in cut(keys, min(grid[1], keys)):
            # The causal border cuts a tile in three: queries above it, on it, and below.
            low = min(max(c - shift, a), b) if causal else a
            full = min(max(d - 1 - shift, low), b) if causal else a
            for i, j, last in ((low, full, full + shift), (full, b, d)):
                if i == j:
                    continue
                part, log = torch.empty(B, H, j - i, q.shape[3]), torch.empty(B, H, j - i)
                stats = torch.empty(B, H, j - i, 2)
                tile = (wide[0][:, :, i:j], wide[1][:, :, c:last], wide[2][:, :, c:last])
                mask = None if key_padding_mask is None else key_padding_mask[:, c:last]
                bias = _bias(attn_bias, alibi_slopes, (B, H, S, keys), slice(i, j), slice(c, last))
                _C.attention_fwd(
                    *tile, mask, bias, None, part, log, scale, j == full, 0.0, 0, stats
                )
                rows = slice(i - a, j - a)
                _merge(
                    top[:, :, rows], total[:, :, rows], result[:, :, rows], log, stats[..., 1], part
                )
            met.append(Piece(c, d, keys, top))
        check_cover(met)
        blind = total == 0  # queries that saw no key
        out[:, :, a:b] = (result / total.masked_fill(blind, 1.0)[..., None]).to(out.dtype)
        if lse is not None:
            lse[:, :, a:b] = torch.where(blind, float("-inf"), top + total.log())


def _bias(attn_bias, slopes, shape, rows, columns) -> Tensor | None:
    """What is added to the logits of one tile; ALiBi counts distances in the whole matrix."""
    bias = None
    if attn_bias is not None:
        bias = attn_bias.expand(shape)[:, :, rows, columns]
        if bias.dtype != torch.bool:
            bias = bias.float()
    if slopes is None:
        return bias
    S, keys = shape[2:]
    i = torch.arange(rows.start, rows.stop)[:, None] + keys - S
    j = torch.arange(columns.start, columns.stop)
    penalty = (-slopes[:, None, None] * (i - j).abs()).expand(*shape[:2], *((i - j).shape))
    if bias is None:
        return penalty
    if bias.dtype == torch.bool:
        return penalty.masked_fill(~bias, float("-inf"))
    return penalty + bias


def _merge(top, total, result, log, own, part) -> None:
    """Folds a tile into maxima and sums [..., n] and outputs times sums [..., n, D], in place.

    log, own: of the tile's sums, and these: a log of 1e38 has no digits left for how many keys.
    """
    highest = log - torch.where(own > 0, own, 1.0).log()
    risen = torch.maximum(top, highest)
    seen = torch.where(risen.isinf(), 0.0, risen)  # a query that has seen no key stays at 0
    old, new = torch.exp(top - seen), torch.exp(highest - seen) * own
    total.mul_(old).add_(new)
    result.mul_(old[..., None]).add_(part * new[..., None])
    top.copy_(risen)

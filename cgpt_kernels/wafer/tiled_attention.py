"""Attention tile by tile: what each core of a grid computes, and how a row of cores merges it.

Queries lie over the rows of cores, keys and values over the columns, in shares that differ by one
at most: in decode, with one query, that is how shifts keep the cache. A core's tile goes through
the CPU kernel, which leaves an output and, of each query, the largest logit and the sum of
exponentials over the core's own keys; a row of cores adds the outputs, weighted by these, in fp32.

Dropout: sums run over all keys, outputs over those that it keeps. So a tile goes through the kernel
once for its sums, and once with what is dropped masked away, by the mask of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import _C, _C_REASON
from .split import Piece, cut, merge_softmax


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
    keep_rows: Callable[[int, int], Tensor] | None = None,
    dropout_p: float = 0.0,
) -> None:
    """Fills out and lse, as `_C.attention_fwd` with these arguments does.

    Args:
        keep_rows: (a, b) -> what dropout keeps of queries a to b, bool [B, H, b - a, S_k].
    """
    if _C is None:
        raise ImportError(_C_REASON)
    B, H, S, D = q.shape
    keys = k.shape[2]
    shift = keys - S  # query i sees keys up to i + shift
    wide = q.float(), k.float(), v.float()

    def kernel(i, j, c, d, diagonal, bias):
        """Largest logit, sum below it, and output times the sum, of queries i:j and keys c:d."""
        part, log = torch.empty(B, H, j - i, D), torch.empty(B, H, j - i)
        stats = torch.empty(B, H, j - i, 2)
        tile = (wide[0][:, :, i:j], wide[1][:, :, c:d], wide[2][:, :, c:d])
        mask = None if key_padding_mask is None else key_padding_mask[:, c:d]
        _C.attention_fwd(*tile, mask, bias, None, part, log, scale, diagonal, 0.0, 0, stats)
        # A log of 1e38 has no digits left for how many keys: the sum itself travels too.
        own = stats[..., 1]
        return log - torch.where(own > 0, own, 1.0).log(), own, part * own[..., None]

    for a, b in cut(S, min(grid[0], S)):
        met = []
        keep = None if keep_rows is None else keep_rows(a, b)
        for c, d in cut(keys, min(grid[1], keys)):
            # The causal border cuts a tile in three: queries above it, on it, and below.
            low = min(max(c - shift, a), b) if causal else a
            full = min(max(d - 1 - shift, low), b) if causal else a
            tiles = [_blind(B, H, b - a, D) for _ in range(1 if keep is None else 2)]
            for i, j, last in ((low, full, full + shift), (full, b, d)):
                if i == j:
                    continue
                bias = _bias(attn_bias, alibi_slopes, (B, H, S, keys), slice(i, j), slice(c, last))
                where = (i, j, c, last, j == full)
                found = [kernel(*where, bias)]
                if keep is not None:
                    found.append(kernel(*where, _only(keep[:, :, i - a : j - a, c:last], bias)))
                for tile, values in zip(tiles, found, strict=True):
                    for whole, value in zip(tile, values, strict=True):
                        whole[:, :, i - a : j - a] = value
            met.append([Piece(c, d, keys, tile) for tile in tiles])
        (top, total, result), *kept = [merge_softmax(one) for one in zip(*met, strict=True)]
        blind = total == 0  # queries that saw no key
        for highest, _, result in kept:
            rescale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
            share = torch.where(highest.isinf(), 0.0, torch.exp(highest - top))
            result.mul_((rescale * share)[..., None])
        out[:, :, a:b] = (result / total.masked_fill(blind, 1.0)[..., None]).to(out.dtype)
        if lse is not None:
            lse[:, :, a:b] = torch.where(blind, float("-inf"), top + total.log())


def _blind(B, H, n, D) -> tuple[Tensor, Tensor, Tensor]:
    """What n queries that see no key give."""
    return torch.full((B, H, n), float("-inf")), torch.zeros(B, H, n), torch.zeros(B, H, n, D)


def _only(keep: Tensor, bias: Tensor | None) -> Tensor:
    """The bias of a tile that sees only what is kept."""
    if bias is None:
        return keep
    return bias & keep if bias.dtype == torch.bool else bias.masked_fill(~keep, float("-inf"))


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

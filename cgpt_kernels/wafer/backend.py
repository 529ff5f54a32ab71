"""backend="wafer": the kernels that dispatch calls, and the reports of what ran.

Each kernel takes the arguments of its namesake in `_C`.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .ops import (
    _kernel,
    _norm_rows,
    _product,
    attention_report,
    gemm_report,
    gemv_report,
    layer_norm_report,
)
from .report import Report
from .spec import WSE2, WaferSpec, check_grid
from .tiled_attention import tiled_attention


@dataclass
class Recording:
    """Reports of the ops that ran on backend "wafer" within `record()`."""

    spec: WaferSpec
    grid: tuple[int, int]
    reports: list[Report] = field(default_factory=list)

    def report(self) -> Report:
        """All ops one after the other, phases named by op."""
        by_op: dict[str, float] = {}
        for r in self.reports:
            kind = r.what.split(" ")[0]
            by_op[kind] = by_op.get(kind, 0.0) + r.cycles
        return Report(
            f"{len(self.reports)} ops",
            self.spec,
            *self.grid,
            sum(r.cycles for r in self.reports),
            by_op,
            macs=sum(r.macs for r in self.reports),
            words=sum(r.words for r in self.reports),
            hops=sum(r.hops for r in self.reports),
            peak_sram_bytes=max((r.peak_sram_bytes for r in self.reports), default=0),
        )


_recordings: list[Recording] = []
SIDE = 32  # of the grid on which backend="wafer" runs outside of `record`


@contextmanager
def record(*, spec: WaferSpec = WSE2, grid: tuple[int, int] = (SIDE, SIDE)):
    """Collect a report of every op that runs on backend "wafer" within the block."""
    check_grid("record", spec, grid)
    recording = Recording(spec, grid)
    _recordings.append(recording)
    try:
        yield recording
    finally:
        _recordings.remove(recording)


def _note(make) -> tuple[int, int]:
    """The grid in force; the report of this op where one is wanted."""
    if not _recordings:
        return SIDE, SIDE
    recording = _recordings[-1]
    recording.reports.append(make(recording.grid, recording.spec))
    return recording.grid


def gemm_fwd(x, weight, bias, residual, y, activation, weight_kn) -> None:
    """The kernel of backend "wafer": arguments as `_C.gemm_fwd`'s."""
    (M, K), N, size = x.shape, y.shape[1], x.element_size()

    def make(grid, spec):
        if M < min(grid):  # too few rows for tiles
            return gemv_report(M, K, N, size, grid, "ktree", spec)
        return gemm_report(M, K, N, size, grid, "mesh", spec)

    grid = (SIDE, SIDE) if not y.numel() or not K else _note(make)
    if not N:
        return
    _product(x, weight, bias, residual, y, activation, weight_kn, grid[1])


def layer_norm_fwd(x, residual, weight, bias, y, total, mean, rstd, eps) -> None:
    """Arguments as `_C.layer_norm_fwd`'s."""
    C = x.shape[-1]
    flat = [t if t is None or t.ndim <= 2 else t.view(-1, C) for t in (x, residual, y, total)]
    x, residual, y, total = flat
    if not x.numel():
        _kernel("layer_norm_fwd")(x, residual, weight, bias, y, total, mean, rstd, eps)
        return
    rows = x.shape[0]
    grid = _note(lambda grid, spec: layer_norm_report(rows, C, x.element_size(), grid, spec))
    _norm_rows(x, residual, weight, bias, y, total, mean, rstd, eps, grid[0])


def attention_fwd(
    q,
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
    keep_mask,
) -> None:
    """Arguments as `_C.attention_fwd`'s, tiles over the grid, merged; but in place of the seed

    keep_mask: (start, count) -> what dropout keeps of these elements of [B, H, S, S_k], bool.
    """
    masks = key_padding_mask, attn_bias, alibi_slopes
    if not q.numel() or not k.shape[2]:
        _kernel("attention_fwd")(q, k, v, *masks, out, lse, scale, causal, 0.0, 0)
        return
    (B, H, S, _), keys = q.shape, k.shape[2]

    def keep_rows(a, b):
        n = (b - a) * keys
        rows = [keep_mask((head * S + a) * keys, n) for head in range(B * H)]
        return torch.stack(rows).view(B, H, b - a, keys)

    grid = _note(lambda grid, spec: attention_report(q.shape, keys, q.element_size(), grid, spec))
    drops = (keep_rows, dropout_p) if dropout_p > 0.0 else ()
    tiled_attention(q, k, v, *masks, out, lse, scale, causal, grid, *drops)

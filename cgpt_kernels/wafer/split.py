"""The ways to spread a model, executed with real numbers: cut, compute the pieces, merge, compare.

Each function gives the same result as the unsplit computation. Pieces carry a seal of what they
cover and hold; a merge refuses when one is lost, comes twice, overlaps another, or is not what was
computed for its place.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A part [start, stop) of an axis of `total`, and what was computed from it.

    seal: a hash of all this, taken when the piece is made, that it carries to its merge.
    """

    start: int
    stop: int
    total: int
    value: Tensor | tuple[Tensor, ...]
    seal: bytes = b""

    def __post_init__(self):
        if not self.seal:
            object.__setattr__(self, "seal", self.hash())

    def hash(self) -> bytes:
        """blake2b of the place and of the bits of the values."""
        found = hashlib.blake2b(f"{self.start}:{self.stop}:{self.total}".encode(), digest_size=16)
        for value in self.value if isinstance(self.value, tuple) else (self.value,):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.digest()


def cut(n: int, parts: int) -> list[tuple[int, int]]:
    """Contiguous shares of n over parts, the first ones longer by one where it does not divide."""
    if not 1 <= parts <= max(n, 1):
        raise ValueError(f"cut: parts must be in 1..{max(n, 1)}, got {parts}")
    bounds = [n * p // parts for p in range(parts + 1)]
    return list(itertools.pairwise(bounds))


def check_cover(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces in order; ValueError unless they cover their axis once, each as it was sealed."""
    if not pieces:
        raise ValueError("merge: no pieces")
    ordered = sorted(pieces, key=lambda p: (p.start, p.stop))
    total, at = ordered[0].total, 0
    for piece in ordered:
        if piece.start != at or piece.total != total or not (piece.stop > at or total == 0):
            spans = ", ".join(f"{p.start}:{p.stop} of {p.total}" for p in ordered)
            raise ValueError(f"merge: pieces {spans} do not cover 0:{total} once")
        if piece.seal != piece.hash():
            raise ValueError(
                f"merge: piece {piece.start}:{piece.stop} of {total} is not what was sealed: "
                f"its value or its place was exchanged"
            )
        at = piece.stop
    if at != total:
        raise ValueError(f"merge: pieces up to {at} do not cover 0:{total} once")
    return ordered


def merge_sum(pieces: Sequence[Piece]) -> Tensor:
    """Sum of partial results, in fp32: the reduce after a product cut along K."""
    ordered = check_cover(pieces)
    return torch.stack([p.value.float() for p in ordered]).sum(0).to(ordered[0].value.dtype)


def merge_concat(pieces: Sequence[Piece], dim: int) -> Tensor:
    """Parts side by side: the gather after a product cut along N or along the sequence."""
    return torch.cat([p.value for p in check_cover(pieces)], dim)


def merge_softmax(pieces: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of queries whose keys were cut: each piece has seen its own.

    A piece holds the largest logit [...], the sum of exponentials below it [...] and the output
    times that sum [..., D], in fp32; the largest logit of one that saw no key is -inf. Returns the
    same three of all keys.
    """
    tops, sums, outputs = zip(*(p.value for p in check_cover(pieces)), strict=True)
    top = torch.stack(tops).amax(0)
    safe = torch.where(top.isinf(), 0.0, top)  # a query that has seen no key stays at 0
    total, output = torch.zeros_like(top), torch.zeros_like(outputs[0])
    for own, part, value in zip(tops, sums, outputs, strict=True):
        share = torch.exp(own - safe)
        total += share * part
        output += share[..., None] * value
    return top, total, output


# ---- tensor parallel ----------------------------------------------------------------------------


def feed_forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Callable[[Tensor], Tensor],
    parts: int,
    gate: Tensor | None = None,
) -> Tensor:
    """activation(x up^T) down^T with the inner width over `parts`: columns, then rows, one sum.

    x [M, C], up [F, C], down [C, F]. gate [F, C]: (activation(x gate^T) * x up^T) down^T instead.
    """

    def inner(a, b):
        wide = x @ up[a:b].t()
        return activation(wide) if gate is None else activation(x @ gate[a:b].t()) * wide

    F = up.shape[0]
    return merge_sum([Piece(a, b, F, inner(a, b) @ down[:, a:b].t()) for a, b in cut(F, parts)])


# ---- pipeline -----------------------------------------------------------------------------------


def pipeline(
    x: Tensor, stages: Sequence[Callable[[Tensor], Tensor]], micro_batches: int
) -> tuple[Tensor, list[list[tuple[int, int]]]]:
    """x [B, ...] through the stages in micro-batches, as the rectangles of layers run it.

    Returns the output and the schedule: for each time slot the (stage, micro-batch) pairs at work.
    Stages * micro_batches slots are filled of stages * len(schedule): the rest is the bubble.
    """
    spans = cut(x.shape[0], micro_batches)
    flying = {m: x[a:b] for m, (a, b) in enumerate(spans)}
    schedule = []
    for slot in range(len(stages) + micro_batches - 1):
        at_work = [(s, slot - s) for s in range(len(stages)) if 0 <= slot - s < micro_batches]
        for stage, m in at_work:
            flying[m] = stages[stage](flying[m])
        schedule.append(at_work)
    pieces = [Piece(a, b, x.shape[0], flying[m]) for m, (a, b) in enumerate(spans)]
    return merge_concat(pieces, 0), schedule


# ---- sequence parallel --------------------------------------------------------------------------


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, parts: int, *, causal: bool = True, scale: float | None = None
) -> Tensor:
    """Attention [B, H, S, D] with the sequence over `parts`: keys and values go round a ring.

    Part p holds its queries; in step s it meets the keys of part (p - s) % parts. What the steps
    give is merged by maxima and sums, in fp32.
    """
    S, D = q.shape[2], q.shape[3]
    scale = D**-0.5 if scale is None else scale
    spans, out = cut(S, parts), []
    for p, (a, b) in enumerate(spans):
        mine, met = q[:, :, a:b].float() * scale, []
        for step in range(parts):
            c, d = spans[(p - step) % parts]
            logits = mine @ k[:, :, c:d].float().transpose(-1, -2)
            if causal:
                visible = torch.arange(c, d)[None, :] <= torch.arange(a, b)[:, None]
                logits = logits.masked_fill(~visible, float("-inf"))
            top = logits.amax(-1)
            weight = torch.exp(logits - torch.where(top.isinf(), 0.0, top)[..., None])
            value = (top, weight.sum(-1), weight @ v[:, :, c:d].float())
            met.append(Piece(c, d, S, value))
        _, total, result = merge_softmax(met)
        out.append(Piece(a, b, S, (result / total[..., None]).to(q.dtype)))
    return merge_concat(out, 2)


# ---- weight streaming ---------------------------------------------------------------------------


def stream_product(x: Tensor, weight: Tensor, columns: int) -> tuple[Tensor, int]:
    """x W^T where only nonzero weights arrive, each as an AXPY on resident activations.

    x [M, K] lies in `columns` columns of cores by K, weight [N, K]. Each column adds up its part of
    every output; the parts meet in a ring along the row. Returns the result and the AXPYs done:
    the nonzeros of W.
    """
    K, count, pieces = x.shape[1], 0, []
    for a, b in cut(K, columns):
        part = x.new_zeros(x.shape[0], weight.shape[0], dtype=torch.float32)
        n, k = weight[:, a:b].nonzero(as_tuple=True)
        for row in n.unique().tolist():
            chosen = k[n == row]
            part[:, row] = (x[:, a + chosen].float() * weight[row, a + chosen].float()).sum(1)
        count += len(n)
        pieces.append(Piece(a, b, K, part))
    return merge_sum(pieces).to(x.dtype), count


# ---- decode with a balanced cache ---------------------------------------------------------------


class ShiftedCache:
    """Keys and values over the rows of a grid, balanced by passing the oldest blocks upwards.

    New entries go to the last row. When a row holds more than its share, it passes its oldest entry
    one row up, so that rows differ by at most one entry and the order of tokens is kept.
    """

    def __init__(self, rows: int, capacity: int):
        if rows < 1 or capacity < 1:
            raise ValueError(f"ShiftedCache: rows and capacity must be positive, got {rows}, "
                             f"{capacity}")  # fmt: skip
        self.capacity, self.rows = capacity, [[] for _ in range(rows)]
        self.moved = 0

    def append(self, entry) -> None:
        """One token's entry. MemoryError, naming the row, when every row is full."""
        if sum(map(len, self.rows)) == self.capacity * len(self.rows):
            raise MemoryError(
                f"ShiftedCache: all {len(self.rows)} rows of cores hold {self.capacity} entries"
            )
        self.rows[-1].append(entry)
        for lower in range(len(self.rows) - 1, 0, -1):
            if len(self.rows[lower]) <= len(self.rows[lower - 1]):
                break
            self.rows[lower - 1].append(self.rows[lower].pop(0))
            self.moved += 1

    def attention(self, q: Tensor, scale: float | None = None) -> Tensor:
        """Attention of one query [..., D] over entries (k, v) of q's shape, merged over the rows.

        Each row of cores gives a maximum, a sum and an output of its own entries, in fp32; the
        merge sees that every entry counts once.
        """
        held, pieces = [len(row) for row in self.rows], []
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        for row, entries in enumerate(self.rows):
            if not entries:
                continue
            k, v = (torch.stack(t).float() for t in zip(*entries, strict=True))  # [n, ..., D]
            logits = (q.float() * scale * k).sum(-1)
            top = logits.amax(0)
            weight = torch.exp(logits - top)
            start = sum(held[:row])
            value = (top, weight.sum(0), (weight[..., None] * v).sum(0))
            pieces.append(Piece(start, start + len(entries), sum(held), value))
        _, total, output = merge_softmax(pieces)
        return (output / total[..., None]).to(q.dtype)

    def entries(self) -> list:
        """All entries, oldest first."""
        return [entry for row in self.rows for entry in row]

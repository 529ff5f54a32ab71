"""What a whole transformer costs on the grid: decode, prefill, training; several ways to spread it.

parallel "tensor": one block at a time on the whole grid. "pipeline": each block on its own
rectangle, embedding and head on a strip below them. "sequence": core groups hold parts of the
context, keys and values go round a ring. "streaming": weights come from outside, columns broadcast
them; time follows the nonzeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .. import checks
from .blocks import (
    LLAMA3_8B,
    QWEN2_72B,
    Block,
    block_of,
    block_phases,
    decode_phases,
    end_phases,
    halves,
    macs_per_token,
    read_phases,
    share,
)
from .memory import Held, need_of
from .phases import cycles, per_core
from .report import Report
from .spec import WSE2, WaferSpec, check_grid, is_number

__all__ = [
    "LLAMA3_8B",
    "MODES",
    "PARALLEL",
    "QWEN2_72B",
    "Block",
    "decode_phases",
    "estimate",
    "longest_decode",
    "macs_per_token",
]
MODES = ("prefill", "decode", "train")
PARALLEL = ("tensor", "pipeline", "sequence", "streaming")
GROUPS = 4  # of rows, that share a sequence


@dataclass(frozen=True)
class Place:
    """Where a model runs: `parts` groups, or a pipeline's stages, of `sides` cores each, and the
    cores of embedding and head."""

    sides: tuple[int, int]
    ends: tuple[int, int]
    parts: int = 1
    ways: tuple[tuple[int, int], ...] = ()  # (links of an edge, places to the next stage)

    def notes(self, b: Block, parallel: str) -> list[str]:
        sides = "{} x {} cores".format(*self.sides)
        if parallel == "sequence":
            return [f"{self.parts} groups of {sides}, keys and values in a ring"]
        if parallel != "pipeline":
            return []
        head = ", embedding and head on {} x {}".format(*self.ends) if b.vocab_size else ""
        return [f"{b.n_layer} stages of {sides}{head}"]


def _place(op: str, b: Block, grid: tuple[int, int], parallel: str, context: int) -> Place:
    rows, columns = grid
    if parallel == "sequence":
        parts = min(GROUPS, rows, context)
        return Place((rows // parts, columns), (rows // parts, columns), parts)
    if parallel != "pipeline":
        return Place(grid, grid)
    # A strip for embedding and head, as many of the cores as they have of the weights.
    head = b.vocab_size * b.n_embd
    strip = 0
    if head:
        strip = max(1, round(rows * head / (head + b.n_layer * b.matrix_elements)))
    above = rows - strip
    across = math.ceil(math.sqrt(b.n_layer * columns / max(1, above)))
    down = math.ceil(b.n_layer / across)
    R, C = above // down, columns // math.ceil(b.n_layer / down)
    if min(R, C) < 1:
        stages = f"{b.n_layer} stages of a pipeline" + (" and its head" if head else "")
        raise ValueError(f"{op}: grid {grid} is too small for {stages}; use a larger one")
    beside, below = (R, C), (C, R)
    ways = ([beside] if down < b.n_layer else []) + ([below] if down > 1 or head else [])
    return Place((R, C), (strip, columns) if head else grid, ways=tuple(ways))


def _hand_over(spec: WaferSpec, place: Place, words: int) -> int:
    """Cycles until a result has crossed the edge to the next rectangle, by the slower way: each
    link of the edge carries its share, and each word goes as far as a rectangle is long."""
    way = spec.stop + 2 * spec.ramp
    return max((share(words, links) + far * spec.hop + way for links, far in place.ways), default=0)


def _between(spec: WaferSpec, place: Place, words: int) -> int:
    """Cycles of one step between groups of rows: `words` of every core go to the core at its place
    in the next group, over one link per column."""
    rows = place.sides[0]
    return rows * (words + spec.hop) + 2 * spec.ramp + spec.stop


def _decode(spec, b, place: Place, context: int, requests: int, groups):
    """One block for a token of each request: cycles by name, maps of its cores, (words, hops)."""
    phases = decode_phases(spec, b, *place.sides, share(context, place.parts), requests)
    one, by_name = cycles(spec, *place.sides, phases, groups)
    moved = per_core(spec, *place.sides, phases, groups)
    software = round(by_name["call of collectives"])
    compute = sum(p.cycles for p in phases if p.axis is None) - software
    maps = {
        "compute": np.full(place.sides, compute),
        "communication": moved["fabric"] + software,
        "idle": one - compute - software - moved["fabric"],
        "hops": moved["hops"],
    }
    if place.parts > 1:
        # maxima, sums and outputs of the groups meet in a chain of them, and come back
        words = requests * (halves(share(b.n_embd, place.sides[1])) + 2)
        far = (place.parts - 1) * (place.sides[0] * spec.hop + 2 * spec.ramp + spec.stop)
        by_name["merge of sequence parts"] = spec.collective_call + 2 * (words + far)
    return by_name, maps, tuple(place.parts * int(moved[name].sum()) for name in ("sent", "hops"))


def _read(spec, b, place: Place, tokens: int, context: int, batch: int, density, mode, recompute):
    """One block for tokens of a prefill or a training: cycles by name, bytes of moving tiles."""
    train = mode == "train"
    by_name, moving = block_phases(spec, b, *place.sides, tokens, context, density, train)
    if recompute:
        again, _ = block_phases(spec, b, *place.sides, tokens, context, density)
        by_name["forward again"] = sum(again.values())
    if place.parts > 1:
        own = share(share(context, place.parts) * batch, place.sides[0])
        words = 2 * halves(own * share(b.kv, place.sides[1]))
        rounds = (3 if train else 1) * (place.parts - 1)  # back: keys, values, and their gradients
        by_name["ring of keys and values"] = rounds * _between(spec, place, words)
        if train:  # a chain of the groups, and back
            words = halves(Held(b, *place.sides).weights(1, head=False))
            sums = 2 * _between(spec, place, words)
            far = 2 * (place.parts - 2) * _between(spec, place, 0)
            by_name["sum of weight gradients"] = spec.collective_call + sums + far
    return by_name, moving


def _check_place(op: str, b: Block, spec: WaferSpec, grid) -> None:
    check_grid(op, spec, grid)
    for name in ("n_embd", "n_inner", "n_layer", "kv", "vocab_size"):
        value, least = getattr(b, name), int(name != "vocab_size")  # 0: no head
        ok = is_number(value, True) and value >= least
        wanted = "a positive integer" if least else "a whole number, at least 0"
        checks.in_range(op, f"config.{name}", value, ok, wanted)


def _check(op, b, spec, grid, mode, parallel, density, recompute, **counts) -> None:
    checks.is_choice(op, "mode", mode, MODES)
    checks.is_choice(op, "parallel", parallel, PARALLEL)
    _check_place(op, b, spec, grid)
    for name, value in counts.items():
        ok = (is_number(value, True) and value > 0) or (name == "groups" and value is None)
        checks.in_range(op, name, value, ok, "a positive integer")
    groups, most = counts["groups"], max(grid)
    ok = groups is None or groups <= most
    checks.in_range(op, "groups", groups, ok, f"at most {most}, the grid's longer side")
    ok = is_number(density, False) and 0 < density <= 1
    checks.in_range(op, "density", density, ok, "in (0, 1]")
    if density != 1.0 and parallel != "streaming":
        raise ValueError(f"{op}: density needs parallel='streaming', which alone skips zeros")
    if recompute and mode != "train":
        raise ValueError(f"{op}: recompute needs mode='train', got mode={mode!r}")


def estimate(
    config,
    *,
    spec: WaferSpec = WSE2,
    grid: tuple[int, int],
    mode: str = "decode",
    batch: int = 1,
    context: int = 2048,
    parallel: str = "tensor",
    groups: int | None = None,
    density: float = 1.0,
    micro_batches: int = 8,
    recompute: bool = False,
) -> Report:
    """Cycles of a whole model on a grid of cores, by phase, with what fits and what does not.

    Args:
        config: a GPTConfig, or a `Block` (gated feed-forward, RMSNorm, grouped keys).
        grid: (rows, columns) of cores. Products take a step for each core of the longer side, so
            the model (not a pipeline) runs on the square of the shorter one where it fits there and
            is faster; notes say so, and where a smaller grid would be faster still.
        mode: "decode" (one token per request), "prefill" (`context` tokens per request) or "train"
            (forward, loss and backward of batch x context tokens, without the optimizer).
        batch: requests or sequences; context: tokens each attends to.
        parallel: "tensor", "pipeline", "sequence" (four groups of rows) or "streaming".
        groups: of the K-tree collectives (default about sqrt(P)).
        density: share of nonzero weights; only streaming skips zeros.
        micro_batches: at most, of the pipeline, whose bubble is part of the result.
        recompute: in training, keep only what enters each block; forward again before its backward.
    Returns:
        Report; `.tokens_per_second` counts produced (decode) or read (prefill, train) tokens.
        `.macs` are those the model asks for: what is computed twice counts once.
    """
    op = "estimate"
    b = block_of(config)
    counts = {"batch": batch, "context": context, "micro_batches": micro_batches, "groups": groups}
    _check(op, b, spec, grid, mode, parallel, density, recompute, **counts)

    def on(rows: int, columns: int) -> Report:
        given = (mode, batch, context, parallel, groups, density, micro_batches, recompute)
        return _estimate(op, b, spec, (rows, columns), *given)

    report = on(*grid)
    return report if parallel == "pipeline" else _best_square(report, on)


def _best_square(report: Report, on) -> Report:
    """For the cores given: the report of all of them, or of the square of the shorter side where
    it is faster and fits. Notes name it, and a square of half the side that is faster still."""
    side = min(report.rows, report.columns)

    def note(found: Report, where: str) -> str:
        return f"{found.cycles:,.0f} cycles on {where}"

    if max(report.rows, report.columns) > side:
        square = on(side, side)
        where = f"{side} x {side} of the cores"
        if square.fits and square.cycles < report.cycles:
            square.rows, square.columns = report.rows, report.columns
            square.notes.insert(0, f"runs on {where}: {note(report, 'all of them')}")
            report = square
        elif square.cycles < report.cycles:
            report.notes.insert(0, f"{note(square, where)}, but it does not fit there")
    if report.fits and side > 1:  # where it does not fit, fewer cores hold even less
        half = on(side // 2, side // 2)
        if half.fits and half.cycles < report.cycles:
            report.notes.append(
                f"faster on a smaller grid: {note(half, f'{half.rows} x {half.columns}')}"
            )
    return report


def _estimate(
    op, b, spec, grid, mode, batch, context, parallel, groups, density, micro_batches, recompute
) -> Report:
    """`estimate` on exactly this grid."""
    place = _place(op, b, grid, parallel, context)
    decode, train = mode == "decode", mode == "train"
    all_tokens = batch if decode else batch * context
    # One token cannot be cut: in decode, micro-batches are requests.
    micro = min(micro_batches, all_tokens) if parallel == "pipeline" else 1
    maps, traffic, moving, notes = {}, (0, 0), 0, place.notes(b, parallel)
    if decode:
        tokens = share(batch, micro)
        micro = share(batch, tokens)  # 9 requests in at most 8 are 5 of 2
        by_name, maps, traffic = _decode(spec, b, place, context, tokens, groups)
        ends = end_phases(spec, b, *place.ends, tokens, groups)
        notes.append("maps of the cores: one block" + (", one group" if place.parts > 1 else ""))
    else:
        own = share(context, place.parts) * batch
        tokens = share(own, micro)
        micro = share(own, tokens)
        if tokens < place.sides[0]:
            notes.append(f"{tokens} tokens at once leave rows of cores empty")
        given = (spec, b, place, tokens, context, batch, density, mode, recompute)
        by_name, moving = _read(*given)
        ends = read_phases(spec, b, *place.ends, tokens, density, train)
        if not train and b.vocab_size:
            last = end_phases(spec, b, *place.ends, share(batch, micro), groups)
            ends["output head"] = last["output head"]
    factor = 3 if train else 1
    work = all_tokens * macs_per_token(b, context, density) * factor
    work += (all_tokens if train else batch) * density * b.vocab_size * b.n_embd * factor

    if parallel == "pipeline":
        crossing = _hand_over(spec, place, tokens * halves(b.n_embd)) * (2 if train else 1)
        phases, total = _pipeline(b.n_layer, by_name, ends, crossing, micro)
    else:
        phases = {name: b.n_layer * value for name, value in by_name.items()}
        for name, value in ends.items():
            phases[name] = phases.get(name, 0.0) + value
        total = sum(phases.values())
    if parallel == "streaming":
        weights = b.n_layer * b.matrix_elements + b.vocab_size * b.n_embd
        bits = min(16, 32 * density)  # of a weight: all of them, or nonzeros with their indices
        # in training: in for the forward and for the backward, and gradients out
        stream = factor * weights * bits / spec.io_bits * spec.clock_hz
        notes.append(f"weights arrive in {stream:,.0f} cycles at {spec.io_bits / 1e12:g} Tb/s")
        if stream > total:
            phases["waiting for weights"] = stream - total
            total = stream

    ways = {"mode": mode, "parallel": parallel, "recompute": recompute}
    sizes = {"batch": batch, "context": context, "tokens": tokens, "micro": micro}
    need = need_of(spec, b, place, **ways, **sizes, moving=moving)
    if train:
        notes.append(f"activations kept for the backward: {need.kept:,} B per core")
    report = Report(
        f"{mode}, {parallel}, {b.n_layer} blocks of {b.n_embd}",
        spec,
        *grid,
        total,
        phases,
        macs=round(work),
        words=b.n_layer * micro * traffic[0],
        hops=b.n_layer * micro * traffic[1],
        peak_sram_bytes=need.total,
        tokens=all_tokens,
        peak_macs_per_cycle=spec.rates["fmach"],
        maps=maps | {"SRAM": np.full(place.sides, need.total)} if maps else {},
        notes=notes,
    )
    if not report.fits:
        report.notes.append(need.advice(spec, grid[0] * grid[1], mode, parallel, recompute))
    return report


def _pipeline(layers, by_name, ends, crossing, micro) -> tuple[dict[str, float], float]:
    """Phases and cycles of `micro` micro-batches through the stages: the first takes all of them,
    each further one the slowest. Phases are those of an average stage."""
    block = sum(by_name.values()) + crossing
    end = sum(ends.values()) + crossing if ends else 0.0
    stages, path, slowest = layers + bool(ends), layers * block + end, max(block, end)
    phases = {name: layers * value * micro / stages for name, value in by_name.items()}
    for name, value in ends.items():
        phases[name] = phases.get(name, 0.0) + value * micro / stages
    phases["hand-over"] = crossing * micro
    phases["waiting for the slowest stage"] = micro * (slowest - path / stages)
    phases["bubble"] = path - slowest
    return phases, path + (micro - 1) * slowest


def longest_decode(config, *, spec: WaferSpec = WSE2, grid: tuple[int, int]) -> dict[str, int]:
    """Tokens until memory is full: caches balanced by shifts, against caches that stay in a row.

    "concatenate": new keys and values go to the last row of cores, which fills first. "shift": each
    full row passes its oldest block one row up, so all rows fill together.
    """
    b = block_of(config)
    _check_place("longest_decode", b, spec, grid)
    core = Held(b, *grid)
    free = spec.sram_bytes - spec.sram_reserved - spec.decoder_code_bytes - spec.stack_bytes
    free -= core.decode(b.n_layer, b.n_layer, True, 0, 1)
    row = max(0, free // core.token(b.n_layer))
    return {"shift": row * grid[0], "concatenate": row}

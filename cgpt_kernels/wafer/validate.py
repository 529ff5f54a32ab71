"""The model against published measurements: what, published, predicted, error, source.

Nothing here is bent to fit: `spec.py` names the rows that its fitted and derived constants come
from, and those rows are marked. Rows that the model misses are shown like all others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from . import measured
from .collectives import collective, formula
from .model import (
    LLAMA3_8B,
    QWEN2_72B,
    Block,
    decode_phases,
    estimate,
    longest_decode,
    macs_per_token,
)
from .ops import gemm_report
from .phases import allreduce, cycles
from .spec import WSE2, WSE3
from .tiles import product_cycles

_HARDWARE = "third-party WSE-3 hardware log (secondary)"
_REDUCE = "arXiv 2404.15888"
_WAFERLLM = "arXiv 2502.04563"
_CSL = "public csl experiments"
TARGETS = {"formula": 0.04, "micro": 0.10, "kernel": 0.10, "end to end": 0.15}


@dataclass(frozen=True)
class Row:
    """One published number beside the model's. used: a constant of the spec comes from this row."""

    what: str
    kind: str
    published: float
    predicted: float
    unit: str
    source: str
    used: bool = False

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        return self.predicted / self.published - 1

    @property
    def within(self) -> bool:
        return abs(self.error) <= TARGETS[self.kind]


def _gemv() -> float:
    # the largest square the wafer holds; a kernel measured alone, without a library's calls
    P, n = 750, 16384
    share = -(-n // P)
    total, _ = cycles(WSE2, P, P, (allreduce("gemv", "y", -(-share // 2)),))
    return WSE2.seconds(product_cycles(WSE2, 1, share, share, 2) + total) * 1e6


@functools.lru_cache(16)
def _decode(P: int, groups: int, dim: int, seq: int, ffn: int, spec=WSE2) -> tuple[float, dict]:
    block = Block(dim, ffn, gated=True, rms=True)
    return cycles(spec, P, P, decode_phases(spec, block, P, P, seq, 1), groups)


def _profile(part: str) -> float:
    total, phases = _decode(240, 10, 2160, 2160, 7200, WSE3)
    moving = sum(v for k, v in phases.items() if "all-reduce" in k or k.startswith("call"))
    return {"": total, ", communication": moving, ", local work": total - moving}[part]


def _strided(n: int, k: int, m: int) -> float:
    """n x k by k x m, a call for each element of the second matrix, operands with strides k and m.

    The loop has none of the index product and descriptor increment (8 + 8 cycles) of the one that
    loop_scalar was read from.
    """
    call = WSE2.vector_cycles("fmacs", n, strides=(k, m), banks=(0, 4))
    return k * m * (WSE2.loop_scalar - 16 + call)


def _mesh(P: int) -> float:
    return gemm_report(2048, 2048, 2048, 2, (P, P), "mesh", WSE2).cycles


_ONE_BLOCK = replace(LLAMA3_8B, n_layer=1, vocab_size=0)
_XL = Block(2048, 8192, 24, vocab_size=50257)


def _sparse_gain(density: float) -> float:
    head = _XL.vocab_size * _XL.n_embd
    dense, sparse = (macs_per_token(_XL, 2048, share) + head for share in (1.0, density))
    return dense / sparse


def _longest(way: str) -> float:
    return longest_decode(_ONE_BLOCK, grid=(360, 360))[way]


def _prefill(block: Block, P: int) -> float:
    headless = replace(block, vocab_size=0)  # the published program has none
    return estimate(headless, grid=(P, P), mode="prefill", context=4096).tokens_per_second


# Rows of each kind: (what, published, predict, unit, source, used).
Rows = Iterator[tuple[str, float, Callable[[], float], str, str, bool]]


def _formulas() -> Rows:
    def row(what, published, kind, algorithm, shape, words):
        def predict():
            return collective(kind, algorithm, shape=shape, words=words).cycles

        return what, published, predict, "cycles", _REDUCE, False

    def line(what, kind, algorithm, P, B):
        what = f"{what}, P = {P}, B = {B}"
        return row(what, formula(kind, algorithm, P, B), kind, algorithm, (1, P), B)

    for B in (1, 256, 4096):
        for name in ("chain", "tree", "two_phase"):
            yield line(f"reduce {name}", "reduce", name, 512, B)
    yield line("reduce star", "reduce", "star", 64, 256)
    yield line("broadcast", "broadcast", "flood", 512, 256)
    yield line("all-reduce by a chain and a flood", "allreduce", "chain", 512, 256)
    flood = 256 + 64 + 48 - 2 + 2 * WSE2.ramp + 1
    yield row("broadcast, 64 x 48, B = 256", flood, "broadcast", "flood", (64, 48), 256)
    what = "reduce by chains, 32 x 48, B = 256: two of one dimension"
    chains = sum(formula("reduce", "chain", P, 256) for P in (48, 32))
    yield row(what, chains, "reduce", "chain", (32, 48), 256)
    yield line("ring all-reduce", "allreduce", "ring", 64, 4096)


def _micro() -> Rows:
    def row(what, published, predict, used=False):
        return what, published, predict, "cycles", _CSL, used

    def fmuls(**options):
        return lambda: WSE2.vector_cycles("fmuls", 5124, **options)

    yield row("@fmuls, 5,124 elements, aligned, WSE-2", 2597, fmuls())
    yield row("the same, one bad operand", 5130, fmuls(banks=(0, 4)))
    yield row("the same, all conflicting", 10254, fmuls(strides=(8,), banks=(0, 4)))
    fmacs = functools.partial(WSE2.vector_cycles, "fmacs", 14)
    yield row("@fmacs, 14 elements, WSE-2", 15, fmacs, True)
    # half the listed rate, as memory gives to operands in conflicting banks
    fmachs = functools.partial(WSE3.vector_cycles, "fmachs", 254, banks=(0, 4))
    yield row("@fmachs, 254 elements, WSE-3", 135.3, fmachs, True)
    send = functools.partial(measured.asynchronous_send, 196)
    yield row("asynchronous send of 196 words, WSE-2", 201, send, True)
    for side, used in ((6, True), (50, False)):
        for spec, published in ((WSE2, 16), (WSE3, 23)):
            what = f"5-point stencil, one cell per core, {side} x {side}, {spec.name}"
            yield row(what, published, functools.partial(measured.cell_stencil, spec, side), used)
    for tile, *both in ((1, 127, 157), (10, 787, 558), (64, 25270, 16924)):
        for spec, published in zip((WSE2, WSE3), both, strict=True):
            what = f"5-point stencil, tiles of {tile} x {tile}, {spec.name}"
            yield row(what, published, functools.partial(measured.tile_stencil, spec, tile))
    for spec, cores, published in ((WSE2, 850_000, 7.5), (WSE3, 900_000, 15.8)):
        peak = 2e-15 * cores * spec.rates["fmach"] * spec.clock_hz
        what = f"dense fp16 peak of {cores:,} cores, {spec.name}"
        yield what, published, functools.partial(float, peak), "PFLOP/s", "vendor", False


def _kernels() -> Rows:
    def row(what, published, predict, source, used=False, unit="cycles"):
        return what, published, predict, unit, source, used

    for name, what, used, both in (
        ("chain", "chain", True, ((40, 5101), (136, 14389))),
        ("preorder", "pre-order tree", False, ((40, 1968), (136, 2274))),
    ):
        for P, published in both:
            predict = functools.partial(measured.task_relay_reduce, name, P)
            what_of = f"task-relay {what}, 3 words, {P} cores, WSE-3"
            yield row(what_of, published, predict, _HARDWARE, used)
    what = "multicast and acknowledge tree, 33 words, 16 x 16, WSE-3"
    tree = functools.partial(measured.multicast_and_acknowledge, 16, 33)
    yield row(what, 2248, tree, _HARDWARE)
    what = "SUMMA fp32, 14^3 tiles, 4 x 4, WSE-2"
    yield row(what, 45783, measured.summa_by_plain_loops, _CSL, True)
    what = "MeshGEMM fp16, 2048^3, 720 x 720 over 360 x 360: flat, WSE-2"
    yield row(what, 1.0, lambda: _mesh(720) / _mesh(360), f"{_WAFERLLM}, text", unit="times")
    for n, k, published in ((64, 48, 476866), (128, 8, 150760)):
        what = f"local fp32 product {n} x {k} x 64, strided columns, WSE-2"
        strided = functools.partial(_strided, n, k, 64)
        yield row(what, published, strided, "public SpMM benchmarks")
    yield row("GEMV fp16, 16K x 16K, WSE-2", 1.2, _gemv, f"{_WAFERLLM}, Table 6", unit="us")


def _end_to_end() -> Rows:
    def tokens_per_second(layers, *shape):
        return WSE2.clock_hz / (_decode(*shape)[0] * layers)

    for name, layers, *shape, published, used in (
        ("LLaMA3-8B", 32, 420, 20, 4200, 4200, 14700, 2699.9, True),
        ("LLaMA3-8B", 32, 660, 22, 4620, 4620, 14520, 2243.3, True),
        ("Qwen2-72B", 80, 420, 20, 8400, 4200, 29820, 839.7, False),
        ("Qwen2-72B", 80, 660, 22, 8580, 4620, 29700, 787.1, False),
    ):
        what = f"decode {name}, {shape[0]} x {shape[0]}, WSE-2"
        predict = functools.partial(tokens_per_second, layers, *shape)
        yield what, published, predict, "tokens/s", f"{_WAFERLLM}, Table 4", used
    for block, name, P, published in (
        (LLAMA3_8B, "LLaMA3-8B", 480, 20320.6),
        (LLAMA3_8B, "LLaMA3-8B", 720, 27686.5),
        (QWEN2_72B, "Qwen2-72B", 480, 2785.2),
        (QWEN2_72B, "Qwen2-72B", 720, 4421.6),
    ):
        what = f"prefill {name}, 4096 tokens, {P} x {P}, WSE-2"
        predict, used = functools.partial(_prefill, block, P), block is LLAMA3_8B
        yield what, published, predict, "tokens/s", f"{_WAFERLLM}, Table 3", used
    for part, published in (("", 15189), (", communication", 11982), (", local work", 3207)):
        what = f"decode block, 240 x 240, WSE-3{part}"
        source = f"{_WAFERLLM}, weak-scaling notebook"
        yield what, published, functools.partial(_profile, part), "cycles", source, True
    for way, published, used in (("concatenate", 382, True), ("shift", 137548, False)):
        what = f"longest decode, LLaMA3-8B block, 360 x 360, KV {way}"
        predict = functools.partial(_longest, way)
        yield what, published, predict, "tokens", f"{_WAFERLLM}, Table 5", used
    for what, published, density in (
        ("work of training GPT-3 XL, dense over 75 % sparse", 2.5, 0.25),
        ("inference with a 1.3B model, dense over 83.8 % sparse", 3.0, 0.162),
    ):
        predict = functools.partial(_sparse_gain, density)
        yield what, published, predict, "times", "arXiv 2303.10464", False


_ROWS = {
    "formula": _formulas,
    "micro": _micro,
    "kernel": _kernels,
    "end to end": _end_to_end,
}


def validate(kinds: str | tuple[str, ...] = tuple(TARGETS)) -> list[Row]:
    """All published rows of these kinds with the model's prediction.

    kinds: among "formula" (target: within 4 %), "micro", "kernel" (10 %), "end to end" (15 %).
    """
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    unknown = set(kinds) - set(TARGETS)
    if unknown:
        raise ValueError(f"validate: kinds must be among {tuple(TARGETS)}, got {sorted(unknown)}")
    return [
        Row(what, kind, float(published), float(predict()), unit, source, used)
        for kind, rows in _ROWS.items()
        if kind in kinds
        for what, published, predict, unit, source, used in rows()
    ]


def markdown(rows: list[Row]) -> str:
    """The rows as a table; `*` marks rows that a constant of the spec was taken from."""
    lines = [
        "| what | kind | published | predicted | error | within target | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        mark = " *" if r.used else ""
        lines.append(
            f"| {r.what}{mark} | {r.kind} | {r.published:,.5g} {r.unit} | {r.predicted:,.5g} "
            f"| {100 * r.error:+.1f} % | {'yes' if r.within else 'NO'} | {r.source} |"
        )
    return "\n".join(lines) + "\n"

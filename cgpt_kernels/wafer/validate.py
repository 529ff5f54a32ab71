"""The model against published measurements: what, published, predicted, error, source.

Nothing here is bent to fit: `spec.py` names the rows that its fitted and derived constants come
from, and those rows are marked. Rows that the model misses are shown like all others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    return {"all": total, "communication": moving, "local": total - moving}[part]


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


def _xl_macs(density: float) -> float:
    return macs_per_token(_XL, 2048, density) + _XL.vocab_size * _XL.n_embd


def _prefill(block: Block, P: int) -> float:
    headless = replace(block, vocab_size=0)  # the published program has none
    return estimate(headless, grid=(P, P), mode="prefill", context=4096).tokens_per_second


def _table() -> list[tuple[str, str, float, Callable[[], float], str, str, bool]]:
    rows = []

    def row(what, kind, published, predict, unit, source, used=False):
        rows.append((what, kind, published, predict, unit, source, used))

    for P, B in ((512, 1), (512, 256), (512, 4096)):
        for name in ("chain", "tree", "two_phase"):
            row(
                f"reduce {name}, P = {P}, B = {B}",
                "formula",
                formula("reduce", name, P, B),
                lambda name=name, P=P, B=B: (
                    collective("reduce", name, shape=(1, P), words=B).cycles
                ),
                "cycles",
                _REDUCE,
            )
    row(
        "reduce star, P = 64, B = 256",
        "formula",
        formula("reduce", "star", 64, 256),
        lambda: collective("reduce", "star", shape=(1, 64), words=256).cycles,
        "cycles",
        _REDUCE,
    )
    row(
        "broadcast, P = 512, B = 256",
        "formula",
        formula("broadcast", "flood", 512, 256),
        lambda: collective("broadcast", shape=(1, 512), words=256).cycles,
        "cycles",
        _REDUCE,
    )
    row(
        "all-reduce by a chain and a flood, P = 512, B = 256",
        "formula",
        formula("allreduce", "chain", 512, 256),
        lambda: collective("allreduce", "chain", shape=(1, 512), words=256).cycles,
        "cycles",
        _REDUCE,
    )
    row(
        "broadcast, 64 x 48, B = 256",
        "formula",
        256 + 64 + 48 - 2 + 2 * WSE2.ramp + 1,
        lambda: collective("broadcast", shape=(64, 48), words=256).cycles,
        "cycles",
        _REDUCE,
    )
    row(
        "reduce by chains, 32 x 48, B = 256: two of one dimension",
        "formula",
        formula("reduce", "chain", 48, 256) + formula("reduce", "chain", 32, 256),
        lambda: collective("reduce", "chain", shape=(32, 48), words=256).cycles,
        "cycles",
        _REDUCE,
    )
    row(
        "ring all-reduce, P = 64, B = 4096",
        "formula",
        formula("allreduce", "ring", 64, 4096),
        lambda: collective("allreduce", "ring", shape=(1, 64), words=4096).cycles,
        "cycles",
        _REDUCE,
    )

    row(
        "@fmuls, 5,124 elements, aligned, WSE-2",
        "micro",
        2597,
        lambda: WSE2.vector_cycles("fmuls", 5124),
        "cycles",
        _CSL,
    )
    row(
        "the same, one bad operand",
        "micro",
        5130,
        lambda: WSE2.vector_cycles("fmuls", 5124, banks=(0, 4)),
        "cycles",
        _CSL,
    )
    row(
        "the same, all conflicting",
        "micro",
        10254,
        lambda: WSE2.vector_cycles("fmuls", 5124, strides=(8,), banks=(0, 4)),
        "cycles",
        _CSL,
    )
    row(
        "@fmacs, 14 elements, WSE-2",
        "micro",
        15,
        lambda: WSE2.vector_cycles("fmacs", 14),
        "cycles",
        _CSL,
        True,
    )
    row(
        "@fmachs, 254 elements, WSE-3",
        "micro",
        135.3,
        # half the listed rate, as memory gives to operands in conflicting banks
        lambda: WSE3.vector_cycles("fmachs", 254, banks=(0, 4)),
        "cycles",
        _CSL,
        True,
    )
    row(
        "asynchronous send of 196 words, WSE-2",
        "micro",
        201,
        lambda: measured.asynchronous_send(196),
        "cycles",
        _CSL,
        True,
    )

    for side, used in ((6, True), (50, False)):
        for spec, published in ((WSE2, 16), (WSE3, 23)):
            row(
                f"5-point stencil, one cell per core, {side} x {side}, {spec.name}",
                "micro",
                published,
                lambda spec=spec, side=side: measured.cell_stencil(spec, side),
                "cycles",
                _CSL,
                used,
            )
    for tile, cycles2, cycles3 in ((1, 127, 157), (10, 787, 558), (64, 25270, 16924)):
        for spec, published in ((WSE2, cycles2), (WSE3, cycles3)):
            row(
                f"5-point stencil, tiles of {tile} x {tile}, {spec.name}",
                "micro",
                published,
                lambda spec=spec, tile=tile: measured.tile_stencil(spec, tile),
                "cycles",
                _CSL,
            )
    for spec, cores, peak in ((WSE2, 850_000, 7.5), (WSE3, 900_000, 15.8)):
        row(
            f"dense fp16 peak of {cores:,} cores, {spec.name}",
            "micro",
            peak,
            lambda spec=spec, cores=cores: 2e-15 * cores * spec.rates["fmach"] * spec.clock_hz,
            "PFLOP/s",
            "vendor",
        )

    for P, published in ((40, 5101), (136, 14389)):
        row(
            f"task-relay chain, 3 words, {P} cores, WSE-3",
            "kernel",
            published,
            lambda P=P: measured.task_relay_reduce("chain", P),
            "cycles",
            _HARDWARE,
            True,
        )
    for P, published in ((40, 1968), (136, 2274)):
        row(
            f"task-relay pre-order tree, 3 words, {P} cores, WSE-3",
            "kernel",
            published,
            lambda P=P: measured.task_relay_reduce("preorder", P),
            "cycles",
            _HARDWARE,
        )
    row(
        "multicast and acknowledge tree, 33 words, 16 x 16, WSE-3",
        "kernel",
        2248,
        lambda: measured.multicast_and_acknowledge(16, 33),
        "cycles",
        _HARDWARE,
    )
    row(
        "SUMMA fp32, 14^3 tiles, 4 x 4, WSE-2",
        "kernel",
        45783,
        measured.summa_by_plain_loops,
        "cycles",
        _CSL,
        True,
    )
    row(
        "MeshGEMM fp16, 2048^3, 720 x 720 over 360 x 360: flat, WSE-2",
        "kernel",
        1.0,
        lambda: _mesh(720) / _mesh(360),
        "times",
        f"{_WAFERLLM}, text",
    )
    for n, k, published in ((64, 48, 476866), (128, 8, 150760)):
        row(
            f"local fp32 product {n} x {k} x 64, strided columns, WSE-2",
            "kernel",
            published,
            lambda n=n, k=k: _strided(n, k, 64),
            "cycles",
            "public SpMM benchmarks",
        )
    row("GEMV fp16, 16K x 16K, WSE-2", "kernel", 1.2, _gemv, "us", f"{_WAFERLLM}, Table 6")

    for name, layers, P, groups, dims, published, used in (
        ("LLaMA3-8B", 32, 420, 20, (4200, 4200, 14700), 2699.9, True),
        ("LLaMA3-8B", 32, 660, 22, (4620, 4620, 14520), 2243.3, True),
        ("Qwen2-72B", 80, 420, 20, (8400, 4200, 29820), 839.7, False),
        ("Qwen2-72B", 80, 660, 22, (8580, 4620, 29700), 787.1, False),
    ):
        row(
            f"decode {name}, {P} x {P}, WSE-2",
            "end to end",
            published,
            lambda P=P, groups=groups, dims=dims, layers=layers: (
                WSE2.clock_hz / (_decode(P, groups, *dims)[0] * layers)
            ),
            "tokens/s",
            f"{_WAFERLLM}, Table 4",
            used,
        )
    for block, name, P, published in (
        (LLAMA3_8B, "LLaMA3-8B", 480, 20320.6),
        (LLAMA3_8B, "LLaMA3-8B", 720, 27686.5),
        (QWEN2_72B, "Qwen2-72B", 480, 2785.2),
        (QWEN2_72B, "Qwen2-72B", 720, 4421.6),
    ):
        row(
            f"prefill {name}, 4096 tokens, {P} x {P}, WSE-2",
            "end to end",
            published,
            lambda block=block, P=P: _prefill(block, P),
            "tokens/s",
            f"{_WAFERLLM}, Table 3",
            block is LLAMA3_8B,
        )
    for part, what, published in (
        ("all", "", 15189),
        ("communication", ", communication", 11982),
        ("local", ", local work", 3207),
    ):
        row(
            f"decode block, 240 x 240, WSE-3{what}",
            "end to end",
            published,
            lambda part=part: _profile(part),
            "cycles",
            f"{_WAFERLLM}, weak-scaling notebook",
            True,
        )
    for way, published, used in (("concatenate", 382, True), ("shift", 137548, False)):
        row(
            f"longest decode, LLaMA3-8B block, 360 x 360, KV {way}",
            "end to end",
            published,
            lambda way=way: longest_decode(_ONE_BLOCK, grid=(360, 360))[way],
            "tokens",
            f"{_WAFERLLM}, Table 5",
            used,
        )
    for what, published, density in (
        ("work of training GPT-3 XL, dense over 75 % sparse", 2.5, 0.25),
        ("inference with a 1.3B model, dense over 83.8 % sparse", 3.0, 0.162),
    ):
        row(
            what,
            "end to end",
            published,
            lambda density=density: _xl_macs(1.0) / _xl_macs(density),
            "times",
            "arXiv 2303.10464",
        )
    return rows


def validate(kinds: tuple[str, ...] = tuple(TARGETS)) -> list[Row]:
    """All published rows of these kinds with the model's prediction.

    kinds: among "formula" (target: within 4 %), "micro", "kernel" (10 %), "end to end" (15 %).
    """
    unknown = set(kinds) - set(TARGETS)
    if unknown:
        raise ValueError(f"validate: kinds must be among {tuple(TARGETS)}, got {sorted(unknown)}")
    return [
        Row(what, kind, float(published), float(predict()), unit, source, used)
        for what, kind, published, predict, unit, source, used in _table()
        if kind in kinds
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

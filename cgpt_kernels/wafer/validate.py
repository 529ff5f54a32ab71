"""The model against published measurements: what, published, predicted, error, source.

Nothing here is bent to fit: `spec.py` names the rows that its fitted and derived constants come
from, and those rows are marked. Rows that the model misses are shown like all others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from .collectives import collective, formula
from .engine import run
from .model import LLAMA3_8B, QWEN2_72B, Block, decode_phases, estimate, longest_decode
from .phases import allreduce, cycles
from .program import RAMP, STEP, Code, Program
from .spec import WSE2, WSE3, WaferSpec
from .tiles import Tiles, build, product_cycles
from .wires import Wires

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


def _send_196() -> float:
    program = Program(WSE2, 1, 2)
    colour = Wires(program, "x").connect([(0, 1)])[0, 1]
    source, sink = Code(WSE2), Code(WSE2)
    for code in (source, sink):
        code.task()
    source.vector("move", 196, send=colour, thread=0)
    source.wait(0)
    source.halt()
    sink.vector("move", 196, read=colour)
    sink.halt()
    program.place(source, 0, 0)
    program.place(sink, 0, 1)
    return float(run(program)["finish"][0, 0])


def _stencil(spec: WaferSpec, side: int = 6) -> float:
    """Cycles per iteration of a 5-point stencil, one cell per core, in the steady state.

    Every core sends its word to all neighbours on one of five colours, chosen so that no two
    neighbours of a core share one.
    """

    def run_for(iterations: int) -> int:
        program = Program(spec, side, side)
        around = [(port, dx, dy) for port, (dx, dy) in enumerate(STEP[:4])]
        for y in range(side):
            for x in range(side):
                near = [(p, x + dx, y + dy) for p, dx, dy in around]
                near = [(p, i, j) for p, i, j in near if 0 <= i < side and 0 <= j < side]
                own = (x + 2 * y) % 5
                program.route(own, (RAMP,), [p for p, _, _ in near], y, x)
                code = Code(spec)
                code.task()
                code.loop(iterations)
                code.vector("move", 1, send=own)
                for port, i, j in near:
                    program.route((i + 2 * j) % 5, (port,), (RAMP,), y, x)
                    code.vector("add", 1, read=(i + 2 * j) % 5)
                code.endloop()
                code.halt()
                program.place(code, y, x)
        return run(program).cycles

    return (run_for(30) - run_for(10)) / 20


def _relay(algorithm: str, P: int, words: int = 3) -> float:
    report = collective("reduce", algorithm, shape=(1, P), words=words, spec=WSE3, relay="task")
    return report.cycles + WSE3.launch


def _multicast_and_acknowledge() -> float:
    down = collective("broadcast", shape=(16, 16), words=33, spec=WSE3, relay="task")
    up = collective("reduce", "preorder", shape=(16, 16), words=1, spec=WSE3, relay="task")
    return down.cycles + up.cycles + WSE3.launch


def _summa() -> float:
    return float(run(build(WSE2, 4, 4, "summa", Tiles(14, 14, 14), loop="scalar")).cycles)


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


def _prefill(block: Block, P: int) -> float:
    headless = replace(block, vocab_size=0)
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
        lambda: WSE3.vector_start + 254 / (WSE3.rates["fmachs"] / WSE3.half_products),
        "cycles",
        _CSL,
        True,
    )
    row("asynchronous send of 196 words, WSE-2", "micro", 201, _send_196, "cycles", _CSL, True)

    for spec, published in ((WSE2, 16), (WSE3, 23)):
        row(
            f"5-point stencil, one cell per core, 6 x 6, {spec.name}",
            "micro",
            published,
            lambda spec=spec: _stencil(spec),
            "cycles",
            _CSL,
            True,
        )
    for P, published in ((40, 5101), (136, 14389)):
        row(
            f"task-relay chain, 3 words, {P} cores, WSE-3",
            "kernel",
            published,
            lambda P=P: _relay("chain", P),
            "cycles",
            _HARDWARE,
            True,
        )
    for P, published in ((40, 1968), (136, 2274)):
        row(
            f"task-relay pre-order tree, 3 words, {P} cores, WSE-3",
            "kernel",
            published,
            lambda P=P: _relay("preorder", P),
            "cycles",
            _HARDWARE,
        )
    row(
        "multicast and acknowledge tree, 33 words, 16 x 16, WSE-3",
        "kernel",
        2248,
        _multicast_and_acknowledge,
        "cycles",
        _HARDWARE,
    )
    row("SUMMA fp32, 14^3 tiles, 4 x 4, WSE-2", "kernel", 45783, _summa, "cycles", _CSL)
    row(
        "local fp32 product 64 x 48 x 64, strided column, WSE-2",
        "kernel",
        476866,
        lambda: 48 * 64 * (WSE2.loop_scalar + WSE2.vector_cycles("fmacs", 64, banks=(0, 4))),
        "cycles",
        "public SpMM benchmarks",
    )
    row("GEMV fp16, 16K x 16K, WSE-2", "kernel", 1.2, _gemv, "us", f"{_WAFERLLM}, Table 6")

    for name, layers, P, groups, dims, published, used in (
        ("LLaMA3-8B", 32, 420, 20, (4200, 4200, 14700), 2699.9, True),
        ("LLaMA3-8B", 32, 660, 22, (4620, 4620, 14520), 2243.3, False),
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
        )
    row(
        "longest decode, KV shift over KV concatenation, 360 x 360",
        "end to end",
        137548 / 382,
        _kv_ratio,
        "times",
        f"{_WAFERLLM}, Table 5",
    )
    return rows


def _kv_ratio() -> float:
    one_block = replace(LLAMA3_8B, n_layer=1, vocab_size=0)
    tokens = longest_decode(one_block, grid=(360, 360))
    return tokens["shift"] / tokens["concatenate"]


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

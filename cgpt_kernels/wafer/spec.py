"""What is known of the machines: the only home of hardware numbers, each with unit, source and tag.

Tags: "published" (vendor documents, papers, public source code), "derived" (computed from published
numbers), "assumed" (chosen here, because nothing is published), "fitted" (set so that one named
published row comes out; at most one per generation).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

TAGS = ("published", "derived", "assumed", "fitted")

# Elements per cycle of the vector builtins, by destination and operand types.
_RATES_WSE2 = {
    "fmach": 4, "fmachs": 2, "fmacs": 1,
    "faddh": 4, "fmulh": 4, "fmovh": 4, "fadds": 2, "fmuls": 2, "fmovs": 2,
    "fmaxh": 1, "fmaxs": 1, "fh2s": 1, "fs2h": 1,
}  # fmt: skip
_RATES_WSE3 = {
    "fmach": 8, "fmachs": 4, "fmacs": 1,
    "faddh": 8, "fmulh": 8, "fmovh": 8, "fadds": 4, "fmuls": 4, "fmovs": 4,
    "fmaxh": 8, "fmaxs": 4, "fh2s": 4, "fs2h": 4,
}  # fmt: skip


# What the engine can hold, and what a machine cannot do without: least and most.
_BOUNDS = {
    "rows": (1, 10**5), "columns": (1, 10**5), "hop": (1, 1000), "ramp": (1, 1000),
    "stop": (0, 1000), "router_queue": (2, 1000), "core_queue": (2, 1000), "colours": (1, 64),
    "switch_positions": (1, 4), "microthreads": (0, 8), "clock_hz": (1.0, math.inf),
    "io_bits": (1.0, math.inf), "banks": (1, math.inf),
}  # fmt: skip


def is_number(value, whole: bool) -> bool:
    """Of Python's own kinds; True and False are none."""
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)


def _f(unit: str, what: str, default=dataclasses.MISSING):
    return field(default=default, metadata={"unit": unit, "what": what})


@dataclass(frozen=True)
class WaferSpec:
    """One machine, real or imagined. `dataclasses.replace(ck.wafer.WSE2, hop=2)` makes another.

    provenance: field name -> (tag, source); what is missing there counts as assumed.
    """

    name: str = _f("", "name")
    columns: int = _f("cores", "widest usable rectangle")
    rows: int = _f("cores", "highest usable rectangle")
    clock_hz: float = _f("Hz", "clock; cycles are what is modelled, seconds follow from this")
    hop: int = _f("cycles", "router to router")
    ramp: int = _f("cycles", "router to core, and core to router (T_R)")
    stop: int = _f("cycles", "of a vector instruction, from operand in to result out")
    rates: Mapping[str, int] = _f("elements/cycle", "vector builtins, operands aligned")
    sram_bytes: int = _f("bytes", "memory of a core", 48 * 1024)
    sram_reserved: int = _f("bytes", "of it not for programs and data", 1024)
    stack_bytes: int = _f("bytes", "stack of a core's program", 4096)
    code_bytes: int = _f("bytes", "code and tables of a kernel", 8192)
    decoder_code_bytes: int = _f("bytes", "code and tables of a whole decoder", 19_880)
    banks: int = _f("", "memory banks of a core", 8)
    colours: int = _f("", "colours that a program may route", 21)
    switch_positions: int = _f("", "routes that one colour can switch between", 4)
    input_queues: int = _f("", "colours that one core can receive", 8)
    microthreads: int = _f("", "vector instructions running beside the main thread", 8)
    router_queue: int = _f("wavelets", "waiting room per port and colour of a router", 2)
    core_queue: int = _f("wavelets", "waiting room per colour before a core", 4)
    vector_start: int = _f("cycles", "issue to first word, an operand on the fabric", 2)
    memory_start: int = _f("cycles", "issue to first element, all operands in memory", 1)
    async_start: int = _f("cycles", "issue to first word of one given to a microthread", 5)
    task_start: int = _f("cycles", "from the end of a task to the next one's first instruction", 0)
    task_relay: int = _f("cycles", "software of a stop that is a task, once its data are there", 84)
    loop_scalar: int = _f("cycles", "scalar loop around a vector instruction, plain code", 43)
    loop_tuned: int = _f("cycles", "the same as @map: descriptors advance in hardware", 2)
    loop_outer: int = _f("cycles", "once per @map: descriptors set anew, loop, branch", 28)
    product_step: int = _f("cycles", "software of a step of a product: set off, join, go on", 120)
    scalar_function: int = _f("cycles/element", "exp, divide or root, in scalar code", 24)
    collective_call: int = _f("cycles", "software around one collective of a whole program", 0)
    launch: int = _f("cycles", "host launch, start and stop of the counter in a timed program", 0)
    io_bits: float = _f("bits/s", "all links to the outside together", 1.2e12)
    sram_total: float = _f("bytes", "memory of the whole wafer, as advertised", 40e9)
    provenance: Mapping[str, tuple[str, str]] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            if f.name in ("name", "rates", "provenance"):
                continue
            value, whole = getattr(self, f.name), f.type == "int"
            low, high = _BOUNDS.get(f.name, (0, math.inf))
            if not is_number(value, whole) or not low <= value <= high or value == math.inf:
                wanted = f"at least {low}" if high == math.inf else f"in {low}..{high}"
                wanted = f"a whole number, {wanted}" if whole else wanted
                raise ValueError(f"WaferSpec: {f.name} must be {wanted}, got {value!r}")
        missing = sorted(_RATES_WSE2.keys() - self.rates.keys())
        if missing:
            raise ValueError(f"WaferSpec: rates must name {', '.join(missing)} too")
        for name, rate in self.rates.items():
            if not is_number(rate, True) or rate < 1:
                raise ValueError(
                    f"WaferSpec: rates of {name!r} must be a positive whole number, got {rate!r}"
                )
        for name, (tag, _) in self.provenance.items():
            if tag not in TAGS or name not in {f.name for f in dataclasses.fields(self)}:
                raise ValueError(f"WaferSpec: bad provenance of {name!r}: {tag!r}")

    def __hash__(self):
        return hash((self.name, self.columns, self.rows, self.hop, self.ramp, self.clock_hz))

    @property
    def data_bytes(self) -> int:
        """SRAM of a core left for data."""
        return self.sram_bytes - self.sram_reserved - self.stack_bytes - self.code_bytes

    @property
    def fp16_flops(self) -> float:
        """Dense fp16 peak of the usable rectangle, FLOP/s."""
        return 2.0 * self.columns * self.rows * self.rates["fmach"] * self.clock_hz

    def seconds(self, cycles: float) -> float:
        return cycles / self.clock_hz

    def vector_cycles(
        self,
        builtin: str,
        length: int,
        *,
        strides: tuple[int, ...] = (1, 1),
        banks: tuple[int, int] | None = None,
    ) -> int:
        """Cycles of one vector instruction on operands in memory, from issue to the last element.

        The slower of two rates counts: the builtin's, and what memory delivers, as many elements as
        `fmovh` or `fmovs` moves where nothing is in the way.

        Args:
            builtin: a key of `rates`, e.g. "fmach".
            length: elements.
            strides: of its operands, in 32-bit words; powers of two lose memory's rate.
            banks: of the two operands that are read; the same bank modulo 4 halves it.
        """
        if builtin not in self.rates:
            raise ValueError(
                f"WaferSpec: no builtin {builtin!r}, known are {', '.join(self.rates)}"
            )
        halves = builtin.endswith("h") and builtin not in ("fs2h",)
        memory = float(self.rates["fmovh" if halves else "fmovs"])
        for stride in strides:
            if stride not in (0, 1):
                memory = min(memory, {0: 1, 1: 2, 7: 2, 4: 2}.get(stride % 8, memory))
        if banks is not None and banks[0] % 4 == banks[1] % 4:
            memory /= 2
        return self.memory_start + math.ceil(length / min(self.rates[builtin], memory))

    def constants(self):
        """Rows (name, value, unit, tag, source, what) of every constant."""
        for f in dataclasses.fields(self):
            if f.name in ("name", "provenance"):
                continue
            tag, source = self.provenance.get(f.name, ("assumed", "no published number"))
            yield f.name, getattr(self, f.name), f.metadata["unit"], tag, source, f.metadata["what"]


_SDK = "vendor SDK documentation"
_REDUCE = "Luczynski et al., HPDC'24, arXiv 2404.15888"
_WAFERLLM = "WaferLLM, OSDI'25, arXiv 2502.04563"
_CSL = "public csl experiments"
_SHARED = {
    "sram_bytes": ("published", _SDK),
    "sram_reserved": ("derived", "a public full-wafer WSE-3 program: 48,128 B usable"),
    "stack_bytes": ("published", "the same program: stack of 4,096 B"),
    "code_bytes": (
        "derived",
        "`decoder_code_bytes` over that program's 75 instructions here, times 30: the longest "
        "kernel, SUMMA, has 26",
    ),
    "decoder_code_bytes": ("derived", f"{_WAFERLLM}, Table 5: 382 tokens without shifts"),
    "banks": ("published", _SDK),
    "colours": ("published", f"{_SDK}: 24, of which the host-copy runtime reserves 21 to 23"),
    "switch_positions": ("published", _SDK),
    "input_queues": ("published", f"{_SDK}: WSE-2 any colour, WSE-3 8 queues"),
    "microthreads": ("published", _SDK),
    "io_bits": ("published", "vendor: 12 x 100 GbE"),
    "loop_scalar": ("published", f"{_CSL}: 12 + 8 + 8 + 7 + 5 + 3 cycles around @fmacs"),
    "rates": ("published", f"{_SDK}, appendix"),
    "sram_total": ("published", "vendor"),
    "loop_tuned": ("derived", f"{_WAFERLLM}, Table 3, LLaMA3-8B: what its step's calls leave"),
    "loop_outer": (
        "derived",
        "two descriptor increments, loop and branch of `loop_scalar`'s parts",
    ),
    "product_step": ("derived", f"{_CSL}: a SUMMA step takes 11,488 = 196 x 58 + 120 cycles"),
    "scalar_function": ("derived", f"{_WAFERLLM}, weak-scaling notebook: local work of a block"),
}

WSE2 = WaferSpec(
    name="WSE-2",
    columns=750,
    rows=994,
    clock_hz=1.1e9,
    hop=1,
    ramp=2,
    stop=1,
    rates=_RATES_WSE2,
    input_queues=24,
    collective_call=426,
    provenance={
        **_SHARED,
        "columns": ("published", f"{_SDK}: 750 x 994"),
        "rows": ("published", f"{_SDK}: 750 x 994"),
        "clock_hz": ("published", f"{_WAFERLLM}'s scripts; 0.85 GHz is published elsewhere"),
        "hop": ("published", _REDUCE),
        "ramp": ("published", _REDUCE),
        "stop": ("published", f"{_REDUCE}: 2 T_R + 1 per software stop"),
        "vector_start": ("derived", f"{_CSL}: 16 cycles per iteration of a 1-cell stencil"),
        "memory_start": ("derived", f"{_CSL}: @fmacs on 14 elements takes 15 cycles"),
        "async_start": ("derived", f"{_CSL}: asynchronous send of 196 words takes 201 cycles"),
        "collective_call": (
            "fitted",
            f"{_WAFERLLM}, Table 4: LLaMA3-8B decode, between 420 x 420 and 660 x 660",
        ),
    },
)

WSE3 = WaferSpec(
    name="WSE-3",
    columns=750,
    rows=1160,
    clock_hz=1.1e9,
    hop=2,
    ramp=2,
    stop=1,
    rates=_RATES_WSE3,
    vector_start=4,
    memory_start=8,
    task_relay=78,
    collective_call=537,
    launch=1328,
    sram_total=44e9,
    provenance={
        **_SHARED,
        "columns": ("published", "public full-wafer program: 750 x 1160"),
        "rows": ("published", "public full-wafer program: 750 x 1160"),
        "clock_hz": ("derived", "as WSE-2's, which the advertised peak of 900,000 cores implies"),
        "hop": ("derived", "all-reduce slope: 2 cycles per added core, 1.1 on WSE-2"),
        "ramp": ("assumed", "as WSE-2's"),
        "stop": ("assumed", "as WSE-2's"),
        "vector_start": ("derived", f"{_CSL}: 23 cycles per iteration of a 1-cell stencil"),
        "memory_start": ("derived", "254 @fmachs in 135.3 cycles: 2 a cycle and 8"),
        "task_relay": ("derived", "slope of the task-relay chain between 40 and 136 cores"),
        "collective_call": (
            "fitted",
            f"{_WAFERLLM}, weak-scaling notebook: communication, P = 240",
        ),
        "launch": (
            "derived",
            "third-party WSE-3 log: what the line through its two chains leaves at 0 stops",
        ),
    },
)
PRESETS = {"wse2": WSE2, "wse3": WSE3}


def preset(name: str) -> WaferSpec:
    """WSE2 or WSE3 by name, as the command line takes it."""
    key = name.lower().replace("-", "")
    if key not in PRESETS:
        raise ValueError(f"wafer: spec must be {' or '.join(PRESETS)}, got {name!r}")
    return PRESETS[key]


def check_grid(op: str, spec: WaferSpec, grid: tuple[int, int], name: str = "grid") -> None:
    """TypeError unless spec is a machine; ValueError unless it holds (rows, columns) of cores."""
    if not isinstance(spec, WaferSpec):
        raise TypeError(f"{op}: spec must be a WaferSpec like ck.wafer.WSE2, got {spec!r}")
    if not isinstance(grid, tuple | list) or len(grid) != 2:
        raise ValueError(f"{op}: {name} must be (rows, columns) of cores, got {grid!r}")
    sides = zip(grid, (spec.rows, spec.columns), strict=True)
    if not all(is_number(n, True) and 0 < n <= most for n, most in sides):
        raise ValueError(
            f"{op}: {name} must be (rows, columns) within {spec.name}'s usable "
            f"({spec.rows}, {spec.columns}) cores, got ({', '.join(map(str, grid))})"
        )

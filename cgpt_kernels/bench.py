"""Benchmarks of the ops: time, bound and share of the bound, beside eager and torch.compile.

A case is checked against the numerics rule first; where that fails no speed-up is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import backends, checks, timing
from .ops import registry
from .ops.case import BENCH, Case
from .testing import hold_to_rule

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


@dataclass(frozen=True)
class Row:
    """One case in one dtype. Times are microseconds per call: minimum, median."""

    op: str
    case: str
    shape: str
    dtype: str
    threads: int
    backend: str
    us: float
    us_median: float
    eager_us: float
    eager_us_median: float
    compile_us: float | None
    compile_us_median: float | None
    bound_us: float
    limit: str
    red: str | None  # what broke the numerics rule

    @property
    def share(self) -> float:
        """Share of the bound reached; beyond 1 where caches beat the measured bandwidth."""
        return self.bound_us / self.us

    @property
    def speedup(self) -> float:
        """Against the faster of eager and torch.compile, by minima; NaN on a red case."""
        if self.red:
            return math.nan
        return min(self.eager_us, self.compile_us or math.inf) / self.us


def _compiled(case: Case, inputs: dict) -> Callable:
    torch._dynamo.reset()
    return case.torch_call(inputs, wrap=torch.compile)


def measure(
    case: Case,
    dtype: torch.dtype,
    *,
    compile: bool = True,
    check: bool = True,
    seconds: float = 1.0,
) -> Row:
    """Time one case against torch's own ways, interleaved."""
    function = registry.FUNCTIONS[case.op]
    inputs = case.inputs(dtype)
    red = None
    if check:
        try:
            with torch.no_grad():
                hold_to_rule(function, inputs)
        except AssertionError as error:
            red = str(error)
    tensors = tuple(v for v in inputs.values() if isinstance(v, torch.Tensor))
    candidates = {"ours": lambda: function(**inputs), "eager": case.torch_call(inputs)}
    if compile:
        candidates["compile"] = _compiled(case, inputs)
    with torch.no_grad():
        taken = timing.interleave(candidates, seconds=seconds)
    threads = torch.get_num_threads()
    limit = timing.bound(case.flops, case.bytes(dtype), dtype, threads)
    compiled = taken.get("compile")
    return Row(
        op=case.op,
        case=case.name,
        shape=case.shape,
        dtype=checks.name_of(dtype),
        threads=threads,
        backend=backends.resolve(case.op, "auto", tensors),
        us=taken["ours"].minimum * 1e6,
        us_median=taken["ours"].median * 1e6,
        eager_us=taken["eager"].minimum * 1e6,
        eager_us_median=taken["eager"].median * 1e6,
        compile_us=compiled and compiled.minimum * 1e6,
        compile_us_median=compiled and compiled.median * 1e6,
        bound_us=limit.seconds * 1e6,
        limit=limit.limit,
        red=red,
    )


HEADER = (
    f"{'op':<21}{'case':<19}{'dtype':<9}{'us':>10}{'eager':>10}{'compile':>10}"
    f"{'bound':>10}{'share':>7}{'speed-up':>10}"
)


def line(row: Row) -> str:
    """The row as text under HEADER: minima."""
    compiled = f"{row.compile_us:>10.1f}" if row.compile_us else f"{'-':>10}"
    speedup = "red" if row.red else f"{row.speedup:.2f}x"
    return (
        f"{row.op:<21}{row.case:<19}{row.dtype:<9}{row.us:>10.1f}{row.eager_us:>10.1f}{compiled}"
        f"{row.bound_us:>10.1f}{row.share:>6.0%} {speedup:>9}"
    )


def run(
    ops: Iterable[str] | None = None,
    dtypes: Iterable[str | torch.dtype] = ("fp32", "bf16"),
    threads: int | None = None,
    out: str | Path | None = None,
    compile: bool = True,
    *,
    cases: Iterable[str] | None = None,
    check: bool = True,
    seconds: float = 1.0,
    show: Callable[[str], object] = print,
) -> list[Row]:
    """Run the benchmark cases of the ops, show a line for each as it comes, write JSON.

    Args:
        ops: names; None for all.
        dtypes: "fp32", "bf16", "fp16" or torch dtypes.
        threads: None for torch's own number.
        out: JSON file; None for bench/results/<machine>/ops.json in a checkout; "" for none.
        compile: also time torch.compile, which takes seconds per case to compile.
        cases: names of cases; None for all marked "bench".
        check: hold each case to the numerics rule first.
        seconds: measuring time of one case.
        show: called with each line of text.
    Raises:
        ValueError: unknown op, dtype or case.
    """
    ops = tuple(registry.FUNCTIONS) if ops is None else tuple(ops)
    dtypes = [timing.dtype_named(d) for d in dtypes]
    for op in ops:
        checks.is_choice("bench", "op", op, tuple(registry.FUNCTIONS))
    chosen = [case for op in ops for case in registry.cases(BENCH, op)]
    if cases is not None:
        cases = tuple(cases)
        for name in cases:
            checks.is_choice("bench", "case", name, tuple(dict.fromkeys(c.name for c in chosen)))
        chosen = [case for case in chosen if case.name in cases]
    rows = []
    with timing.threads(threads) as count:
        busy = timing.others_busy()
        show(f"{timing.machine_cpu()}, {count} threads, torch {torch.__version__}; microseconds")
        if busy is not None and busy > timing.BUSY:
            show(f"other processes use {busy:.0%} of the cores: trust ratios at most")
        show(HEADER)
        for case in chosen:
            for dtype in dtypes:
                row = measure(case, dtype, compile=compile, check=check, seconds=seconds)
                rows.append(row)
                show(line(row))
                if row.red:
                    show(f"  numerics: {row.red}")
        if out is None:
            out = RESULTS / timing.machine_name() / "ops.json" if RESULTS.parent.is_dir() else ""
        if out:
            more = {"others_busy_before": busy, "cpu_isa": backends._C and backends._C.cpu_isa()}
            path = timing.write(Path(out), [asdict(row) for row in rows], **more)
            show(f"written to {path}")
    return rows

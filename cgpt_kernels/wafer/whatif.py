"""What else one could do: reports beside a report, by the question that they answer.

A variant that the machine or the shapes do not allow is left out: its error is the answer to
another question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .collectives import REDUCES, collective, formula
from .model import MODES, PARALLEL, estimate
from .ops import gemm_report
from .report import Report
from .spec import PRESETS, WaferSpec, check_grid
from .tiles import ALGORITHMS

Answers = dict[str, list[Report]]
SLOW = 4.0  # times the cheapest algorithm by its formula: beyond that it is not simulated


def _possible(make: Callable[[object], Report], variants: Iterable) -> list[Report]:
    found = []
    for variant in variants:
        try:
            found.append(make(variant))
        except ValueError:
            continue
    return found


def _machines(spec: WaferSpec) -> list[WaferSpec]:
    return [other for other in PRESETS.values() if other is not spec]


def grids_around(grid: tuple[int, int], spec: WaferSpec) -> list[tuple[int, int]]:
    """Quarter, half and three quarters of the sides, and twice or as much as the wafer holds."""
    sides = [tuple(max(1, n * part // 4) for n in grid) for part in (1, 2, 3)]
    most = tuple(min(2 * n, spec.rows, spec.columns) for n in grid)
    return [g for g in dict.fromkeys([*sides, most]) if g != tuple(grid)]


def of_estimate(model: str, config, grid, spec: WaferSpec, **options) -> Answers:
    """Another machine, other grids, other ways to spread the model, other modes.

    model: the name that each report bears.
    """

    def make(**changed):
        report = estimate(config, **{"grid": grid, "spec": spec, **options, **changed})
        report.what = f"{model}: {report.what}"
        return report

    modes = [mode for mode in MODES if mode != options.get("mode", "decode")]
    ways = [way for way in PARALLEL if way != options.get("parallel", "tensor")]
    if options.get("density", 1.0) != 1.0:
        ways = []
    return {
        "Another machine": _possible(lambda other: make(spec=other), _machines(spec)),
        "Other grids": _possible(lambda g: make(grid=g), grids_around(grid, spec)),
        "Other ways to spread it": _possible(lambda way: make(parallel=way), ways),
        "Other modes": _possible(lambda mode: make(mode=mode), modes),
    }


def of_gemm(M, K, N, itemsize, grid, algorithm: str, spec: WaferSpec) -> Answers:
    """Other algorithms, another machine, other grids."""

    def make(grid=grid, algorithm=algorithm, spec=spec):
        check_grid("wafer", spec, grid)
        return gemm_report(M, K, N, itemsize, grid, algorithm, spec)

    others = [name for name in ALGORITHMS if name != algorithm]
    return {
        "Other algorithms": _possible(lambda name: make(algorithm=name), others),
        "Another machine": _possible(lambda other: make(spec=other), _machines(spec)),
        "Other grids": _possible(lambda g: make(grid=g), grids_around(grid, spec)),
    }


def of_collective(kind, algorithm, shape, words, spec: WaferSpec, relay, groups=None) -> Answers:
    """Other algorithms, stops of the other kind, another machine."""

    def make(algorithm=algorithm, spec=spec, relay=relay):
        return collective(
            kind, algorithm, shape=shape, words=words, spec=spec, relay=relay, groups=groups
        )

    P = max(shape)
    names = [] if kind == "broadcast" else [*REDUCES, *(["ring"] if kind == "allreduce" else [])]
    costs = {name: formula(kind, name, P, words, spec) for name in names}
    cheap = [n for n in names if n != algorithm and costs[n] <= SLOW * min(costs.values())]
    other = "task" if relay == "instruction" else "instruction"
    return {
        "Other algorithms": _possible(lambda name: make(algorithm=name), cheap),
        "Stops of the other kind": _possible(lambda r: make(relay=r), [other]),
        "Another machine": _possible(lambda s: make(spec=s), _machines(spec)),
    }

"""The phase engine for programs of local work and collectives along one axis at a time.

A sequence is a list of phases: local work, the same on every core, an all-reduce of some words
along x or along y, or a shift: every core passes words to its neighbour towards position 0. When
core (px, py) has finished its share, it goes on: nobody waits for the whole grid. Its finishing
time is then f(px) + g(py): a phase along x moves every row alike and adds to f only, a phase along
y to g only. So one row that runs the phases along x, and one column that runs those along y, give
the time of the whole grid, exactly where both are simulated: cycles = max f + max g. `whole` runs
the same phases on all cores for comparison.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .collectives import Flood, Reduce
from .engine import Run, run
from .program import Code, Program, at
from .spec import WaferSpec
from .wires import Wires


@dataclass(frozen=True)
class Phase:
    """axis None: `cycles` of local work; "x" or "y": all-reduce or shift of `words` along it."""

    name: str
    axis: str | None = None
    words: int = 0
    cycles: int = 0
    shifts: bool = False


def local(name: str, cycles: float) -> Phase:
    return Phase(name, None, 0, max(0, round(cycles)))


def allreduce(name: str, axis: str, words: int) -> Phase:
    return Phase(name, axis, words)


def shift(name: str, axis: str, words: int) -> Phase:
    """What keeps a KV cache balanced: the oldest entry of every core goes one core up."""
    return Phase(name, axis, words, shifts=True)


class _Axis:
    def __init__(self, program: Program, axis: str, groups: int | None, shifts: bool):
        wires = Wires(program, axis)
        self.length = wires.P
        self.reduce = Reduce(wires, "ktree", groups)
        self.flood = Flood(wires, self.reduce.root)
        self.up = {}
        if shifts:
            # where the reduce goes this way too, its colour serves: input queues are few
            edges = [(p, p - 1) for p in range(1, wires.P)]
            missing = [e for e in edges if e not in self.reduce.colours]
            self.up = self.reduce.colours | wires.connect(missing)

    def write(self, code: Code, p: int, phase: Phase) -> None:
        if phase.shifts:
            self._shift(code, p, phase.words)
            return
        self.reduce.write(code, p, phase.words, 0, "instruction")
        self.flood.write(code, p, phase.words, 0, "instruction")

    def _shift(self, code: Code, p: int, words: int) -> None:
        """Sends from address 0 and receives behind it, at once."""
        if p + 1 < self.length:
            code.vector("move", words, read=self.up[p + 1, p], to=at(words), thread=0)
        if p:
            code.vector("move", words, a=at(0), send=self.up[p, p - 1])
        if p + 1 < self.length:
            code.wait(0)

    def role(self, p: int):
        colours = self.reduce.colours
        return (p == self.reduce.root, self.up.get((p, p - 1)), self.up.get((p + 1, p)), *(
            (way, colours[(q, p) if way == "from" else (p, q)]) for way, q in self.reduce.stops[p]
        ))  # fmt: skip


def build(
    spec: WaferSpec, rows: int, columns: int, phases: tuple[Phase, ...], groups: int | None
) -> Program:
    """All phases on all cores; an axis of length 1 does nothing in its phases."""
    words = max([p.words * (2 if p.shifts else 1) for p in phases], default=1) or 1
    names = tuple(dict.fromkeys(p.name for p in phases))
    program = Program(spec, rows, columns, names, words)
    shifted = {p.axis for p in phases if p.shifts}
    axes = {axis: _Axis(program, axis, groups, axis in shifted) for axis in ("x", "y")}
    roles_x = [axes["x"].role(px) for px in range(columns)]
    roles_y = [axes["y"].role(py) for py in range(rows)]
    made = {}
    for py in range(rows):
        for px in range(columns):
            key = (roles_x[px], roles_y[py])
            if key not in made:
                code = Code(spec)
                code.task()
                for phase in phases:
                    code.tag = names.index(phase.name)
                    code.calc(phase.cycles)
                    if phase.axis:
                        axes[phase.axis].write(code, px if phase.axis == "x" else py, phase)
                code.halt()
                made[key] = code
            program.place(made[key], py, px)
    return program


def whole(spec, rows, columns, phases, groups=None) -> Run:
    """The cycle engine on the whole grid."""
    return run(build(spec, rows, columns, tuple(phases), groups))


@functools.lru_cache(256)
def _line(spec, axis: str, length: int, phases: tuple[Phase, ...], groups: int | None) -> Run:
    """One row (axis x) or column of the grid through its own phases."""
    shape = (1, length) if axis == "x" else (length, 1)
    return run(build(spec, *shape, phases, groups))


def _lines(spec, rows, columns, phases, groups):
    """(axis, run) of the representative row and column; none where nothing moves."""
    for axis, length in (("x", columns), ("y", rows)):
        chosen = tuple(p for p in phases if p.axis == axis)
        if chosen and length > 1:
            yield axis, _line(spec, axis, length, chosen, groups)


def cycles(
    spec: WaferSpec, rows: int, columns: int, phases: tuple[Phase, ...], groups: int | None = None
) -> tuple[int, dict[str, float]]:
    """Cycles of the whole grid and of each phase, from one row and one column."""
    total, by_name = 0, {phase.name: 0.0 for phase in phases}
    for _, done in _lines(spec, rows, columns, phases, groups):
        total += done.cycles
        last = done["finish"].reshape(-1).argmax()
        times = done.phases.reshape(-1, len(done.program.phases))[last]
        for name, time in zip(done.program.phases, times.tolist(), strict=True):
            by_name[name] += time
    for phase in phases:
        if phase.axis is None:
            total += phase.cycles
            by_name[phase.name] += phase.cycles
    return total, by_name


def per_core(
    spec: WaferSpec, rows: int, columns: int, phases: tuple[Phase, ...], groups: int | None = None
) -> dict[str, np.ndarray]:
    """Statistics of the engine for all cores [rows, columns]: those of its row and its column."""
    found = {name: np.zeros((rows, columns), np.int64) for name in ("fabric", "sent", "hops")}
    for _, done in _lines(spec, rows, columns, phases, groups):
        for name, values in found.items():
            values += done[name]  # [1, columns] or [rows, 1]
    return found

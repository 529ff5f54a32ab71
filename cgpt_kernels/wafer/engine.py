"""Runs a program: in the C++ engine, or in its twin, the slow interpreter in twin.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..backends import _C, _C_REASON
from .program import STATISTICS, Program

MAX_CYCLES = 10**9


@dataclass
class Run:
    """What a run left: cycles, per-core statistics, time per phase, values, log of events.

    statistics: [rows, columns, len(STATISTICS)]; phases: [rows, columns, names] cycles of the main
    thread; memory: [rows, columns, words] fp32 or None; log: [n, 5] (cycle, core, thread,
    instruction, 0 launched | 1 done), ordered.
    """

    program: Program
    cycles: int
    events: int
    statistics: np.ndarray
    phases: np.ndarray
    memory: np.ndarray | None
    log: np.ndarray | None

    def __getitem__(self, name: str) -> np.ndarray:
        """One statistic of every core, [rows, columns]."""
        return self.statistics[..., STATISTICS.index(name)]


def run(program: Program, *, log: int = 0, max_cycles: int = MAX_CYCLES, engine=None) -> Run:
    """Check the budgets, then simulate until every core has halted.

    Args:
        log: room for this many events.
        engine: a function with the signature of `_C.wafer_run`; default that one.
    Raises:
        ValueError: a budget or a route is impossible. RuntimeError: deadlock, two sources on one
        colour, or a wavelet that nobody receives; all name core and colour.
    """
    program.check()
    if engine is None:
        if _C is None:
            raise ImportError(_C_REASON)
        engine = _C.wafer_run
    arrays = program.lowered()
    cores = program.rows * program.columns
    memory = None
    if program.memory is not None:
        memory = np.array(program.memory, np.float32).reshape(cores, program.words)
    statistics = np.zeros((cores, len(STATISTICS)), np.int64)
    phases = np.zeros((cores, len(program.phases)), np.int64)
    events = np.zeros((log, 5), np.int64) if log else None
    cycles, visits, logged = engine(
        program.constants(max_cycles), *arrays.values(), memory, statistics, phases, events
    )
    if events is not None:
        events = events[: min(logged, log)]
        events = events[np.lexsort(events.T[[3, 4, 2, 1, 0]])]
    shape = (program.rows, program.columns, -1)
    return Run(
        program,
        cycles,
        visits,
        statistics.reshape(shape),
        phases.reshape(shape),
        None if memory is None else memory.reshape(shape),
        events,
    )

"""Runs a program: in the C++ engine, or in its twin, the slow interpreter in twin.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..backends import _C, _C_REASON
from .program import STATISTICS, Program
from .report import Report

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


def report_of(what: str, done: Run) -> Report:
    """A report of one simulated program."""
    program = done.program
    spec = program.spec
    last = np.unravel_index(int(done["finish"].argmax()), done["finish"].shape)
    cycles = done.cycles
    phases = dict(zip(program.phases, map(float, done.phases[last]), strict=True))
    phases = {k: v for k, v in phases.items() if v}
    compute = done["compute"]
    # words go two and more at a time, beside no computation: never more cycles than that leaves
    communication = np.minimum(done["fabric"], cycles - compute)
    report = Report(
        what,
        spec,
        program.rows,
        program.columns,
        cycles,
        phases,
        macs=int(done["macs"].sum()),
        words=int(done["sent"].sum()),
        hops=int(done["hops"].sum()),
        peak_sram_bytes=4 * program.words + spec.code_bytes + spec.stack_bytes,
        peak_macs_per_cycle=spec.rates["fmacs"],
        maps={
            "compute": compute,
            "communication": communication,
            "idle": cycles - compute - communication,
            "hops": done["hops"],
        },
    )
    report.maps["SRAM"] = np.full(compute.shape, report.peak_sram_bytes)
    report.result = done.memory
    if done.log is not None:
        report.timeline = timeline(done)
    return report


def timeline(done: Run) -> list:
    """Spans (core, thread, phase, start, end) from a run's log."""
    code = done.program.lowered()["code"]
    tags, open_at, spans = code[:, 23], {}, []
    # an end comes before the launch that follows in the same cycle
    for cycle, core, thread, instruction, what in sorted(
        done.log.tolist(), key=lambda row: (row[0], -row[4])
    ):
        if what == 0:
            open_at[core, thread] = cycle
        elif (core, thread) in open_at:
            py, px = divmod(core, done.program.columns)
            name = done.program.phases[tags[instruction]]
            start = open_at.pop((core, thread))
            spans.append((f"px {px}, py {py}", thread, name, start, cycle))
    return spans

"""What a modelled run cost: cycles, phases, traffic, memory; per core where simulated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .spec import WaferSpec


@dataclass
class Report:
    """Modelled cost of one program, op or model. Cycles are the model's; no time was measured.

    phases: name -> cycles on the critical path. macs, words (sent by cores), hops (words over
    links) are totals. tokens: what was produced, for tokens_per_second. maps: name -> [rows,
    columns] values per core. timeline: (core, thread, name, start, end) of simulated cores. notes:
    what fits and what does not, and which rows and columns stand for the whole.
    """

    what: str
    spec: WaferSpec
    rows: int
    columns: int
    cycles: float
    phases: dict[str, float] = field(default_factory=dict)
    macs: int = 0
    words: int = 0
    hops: int = 0
    peak_sram_bytes: int = 0
    tokens: float = 0.0
    peak_macs_per_cycle: float = 0.0  # of one core, for utilization
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    timeline: list[tuple[str, int, str, int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    result: np.ndarray | None = None  # what simulated cores held at the end, [rows, columns, words]

    @property
    def seconds(self) -> float:
        """At the spec's clock."""
        return self.spec.seconds(self.cycles)

    @property
    def utilization(self) -> float:
        """Multiply-adds per cycle over the peak of all its cores."""
        peak = self.peak_macs_per_cycle or self.spec.rates["fmach"]
        cores = self.rows * self.columns
        return self.macs / (cores * peak * self.cycles) if self.cycles else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.cycles else 0.0

    @property
    def fits(self) -> bool:
        """Whether every core's memory suffices."""
        return self.peak_sram_bytes <= self.spec.sram_bytes - self.spec.sram_reserved

    def imbalance(self, name: str) -> dict[str, float]:
        """mean, p95, max and max / mean over the cores of one map."""
        values = self.maps[name].astype(float)
        mean, top = float(values.mean()), float(values.max())
        p95 = float(np.percentile(values, 95))
        return {"mean": mean, "p95": p95, "max": top, "max/mean": top / mean if mean else 0.0}

    def to_dict(self) -> dict:
        return {
            "what": self.what,
            "spec": self.spec.name,
            "clock_hz": self.spec.clock_hz,
            "grid": [self.rows, self.columns],
            "cycles": float(self.cycles),
            "seconds": self.seconds,
            "phases": {k: float(v) for k, v in self.phases.items()},
            "macs": int(self.macs),
            "words": int(self.words),
            "hops": int(self.hops),
            "peak_sram_bytes": int(self.peak_sram_bytes),
            "fits": self.fits,
            "utilization": self.utilization,
            "tokens_per_second": self.tokens_per_second,
            "cores": {name: self.imbalance(name) for name in self.maps},
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        head = (
            f"{self.what} on {self.spec.name}, {self.rows} x {self.columns} cores: "
            f"{self.cycles:,.0f} cycles, {self.seconds * 1e6:,.2f} us at "
            f"{self.spec.clock_hz / 1e9:g} GHz"
        )
        lines = [head]
        if self.tokens:
            lines[0] += f", {self.tokens_per_second:,.1f} tokens/s"
        for name, cycles in self.phases.items():
            share = cycles / self.cycles if self.cycles else 0.0
            lines.append(f"  {name:<24}{cycles:>16,.0f}  {share:6.1%}")
        sram = "fits" if self.fits else "DOES NOT FIT"
        lines.append(f"  SRAM per core {self.peak_sram_bytes:,} B: {sram}")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)

    def save_trace(self, path: str | Path) -> None:
        """Chrome/Perfetto trace JSON of the timeline, one microsecond per cycle."""
        Path(path).write_text(json.dumps(trace_events(self)))

    def save_heatmap(self, path: str | Path) -> None:
        """PNG of the maps (needs matplotlib)."""
        from .pictures import heatmap

        heatmap(self, path)

    def save_html(
        self, path: str | Path, *, compare: Sequence[Report] | Mapping[str, Sequence[Report]] = ()
    ) -> None:
        """One self-contained HTML file; `compare` fills its what-if tables, by question."""
        from .pictures import html

        Path(path).write_text(html(self, compare))


def trace_events(report: Report) -> dict:
    """The timeline in the trace event format, which Perfetto reads: a core is a process.

    Complete events ("X") for instructions, metadata ("M") for names. Where no cores were simulated
    the phases follow one another.
    """
    timeline = report.timeline
    if not timeline:
        start = 0
        for name, cycles in report.phases.items():
            timeline = [*timeline, (report.what, 0, name, start, start + round(cycles))]
            start += round(cycles)
    events, processes, threads = [], {}, set()

    def name_of(what: str, pid: int, tid: int, name: str):
        events.append({"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}})

    for process, thread, name, start, end in timeline:
        pid = processes.setdefault(process, len(processes) + 1)
        if (pid, thread) not in threads:
            if not any(seen == pid for seen, _ in threads):
                name_of("process_name", pid, thread, process)
            threads.add((pid, thread))
            micro = report.timeline and thread < report.spec.microthreads
            name_of("thread_name", pid, thread, f"microthread {thread}" if micro else "main thread")
        events.append(
            {"ph": "X", "cat": "wafer", "name": name, "pid": pid, "tid": thread, "ts": start,
             "dur": end - start}
        )  # fmt: skip
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {"unit": "1 us of the trace is 1 modelled cycle", "spec": report.spec.name},
    }

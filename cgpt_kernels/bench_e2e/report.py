"""What the run shows: a table of systems per format, the table of targets, JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich import box
from rich.table import Table

from .measure import Row
from .systems import FORMATS, Absent, System
from .targets import Verdict, share


def systems_table(format: str, group: dict) -> Table:
    """Medians of one format, each with its share of the bound.

    Last column: leading greedy tokens that are eager fp32's, and where they part by how many
    standard deviations of the logits.
    """
    rows = rows_of(group)
    works = list(dict.fromkeys(row.work for row in rows))
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column(format)
    shape = {row.work: row for row in rows}
    for work in works:
        rows_text = f" x {shape[work].batch}" if shape[work].batch > 1 else ""
        out.add_column(f"prefill {shape[work].prompt}{rows_text}, ms", justify="right")
        out.add_column("bound", justify="right")
        if shape[work].token_median is not None:
            out.add_column(f"decode{rows_text}, tok/s", justify="right")
            out.add_column("bound", justify="right")
    out.add_column("tokens = eager fp32's")
    for name in dict.fromkeys(row.system for row in rows):
        own = {row.work: row for row in rows if row.system == name}
        cells = []
        for work in works:
            cells += _cells(own.get(work), shape[work].token_median is not None)
        row = next(iter(own.values()))
        out.add_row(row.title, *cells, _agreement(list(own.values())))
    return out


def _cells(row: Row | None, decode: bool) -> list[str]:
    if row is None:
        return ["-", ""] * (2 if decode else 1)
    cells = [f"{row.prefill_median * 1e3:.0f}", f"{share(row, 'prefill'):.0%}"]
    if decode:
        cells += [f"{row.tokens_per_second:.1f}", f"{share(row, 'decode'):.0%}"]
    return cells


def _agreement(rows: list[Row]) -> str:
    red = next((row.red for row in rows if row.red), None)
    if red:
        return f"[red]{red}[/]"
    row = min(rows, key=lambda r: r.same / r.compared)
    if row.same == row.compared:
        return f"all {max(r.compared for r in rows)}"
    return f"first {row.same} of {row.compared}; {max(r.gap for r in rows):.2f} sd"


def targets_table(verdicts: list[Verdict]) -> Table:
    """Ours, the best peer, the ratio, the target, and whether it is met."""
    columns = ["target", "ours", "median", "best peer", "reached", "asked", "verdict"]
    out = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (out.columns[2], *out.columns[4:6]):
        column.justify = "right"
    for v in verdicts:
        reached = "-" if v.value is None else _number(v.value, v.is_share)
        asked = _number(v.target, v.is_share)
        style = "green" if v.met else "yellow"
        who = v.who.removeprefix("ours, ")
        out.add_row(v.name, who, v.ours, v.peer, reached, asked, f"[{style}]{v.verdict}[/]")
    return out


def _number(value: float, is_share: bool) -> str:
    return f"{value:.0%}" if is_share else f"{value:.2f}x"


def notes(systems: list[System]) -> list[str]:
    """What each system's numbers include."""
    return list(dict.fromkeys(f"{s.title}: {s.note}" for s in systems))


def left_out(absent: list[Absent], failed: dict[str, str]) -> list[str]:
    """Every system that did not run, with the reason."""
    lines = [f"{a.title} ({', '.join(a.formats)}): {a.reason}" for a in absent]
    return lines + [f"{key}: {reason}" for key, reason in failed.items()]


def rows_of(group: dict) -> list[Row]:
    return [Row(**row) for row in group["rows"]]


def read(path: Path) -> dict:
    """An earlier run's groups, which a run of other formats keeps; {} where there is none."""
    return json.loads(path.read_text())["groups"] if path.is_file() else {}


def write(path: Path, model: str, groups: dict, verdicts: list[Verdict]) -> Path:
    """All groups, each with its machine, roofs and rows, and the verdicts drawn from them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = [
        {
            "name": v.name,
            "ours": v.who,
            "median": v.ours,
            "peer": v.peer,
            "reached": v.value,
            "asked": v.target,
            "verdict": v.verdict,
        }
        for v in verdicts
    ]
    ordered = {kind: groups[kind] for kind in FORMATS if kind in groups}
    content = {"model": model, "groups": ordered, "targets": drawn}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path

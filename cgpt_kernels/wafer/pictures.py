"""Reports as pictures: heat maps of the cores as PNG, and one HTML file that needs nothing else."""

from __future__ import annotations

import html as escape
import itertools
from pathlib import Path

import numpy as np

from .report import Report

CELLS = 64  # a map is averaged down to at most this many cells per side
_COLOURS = ("#4878a8", "#e08030", "#609858", "#b84848", "#8868a8", "#806040", "#c870a8", "#888888")


def heatmap(report: Report, path: str | Path) -> None:
    """PNG of every map of the report, one panel each.

    Raises:
        ValueError: the report has no maps, because no core was simulated.
        ImportError: matplotlib is missing.
    """
    if not report.maps:
        raise ValueError(
            f"save_heatmap: {report.what!r} has no maps: its cycles come from representative rows; "
            "run a grid small enough for the cycle engine"
        )
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("save_heatmap needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(report.maps), figsize=(3.4 * len(report.maps), 3.4))
    for axis, (name, values) in zip(np.atleast_1d(axes), report.maps.items(), strict=True):
        picture = axis.imshow(values, cmap="viridis", interpolation="nearest")
        figure.colorbar(picture, ax=axis, shrink=0.8)
        axis.set(title=name, xlabel="px", ylabel="py")
    figure.suptitle(f"{report.what}: {report.cycles:,.0f} modelled cycles on {report.spec.name}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _averaged(values: np.ndarray) -> np.ndarray:
    """At most CELLS x CELLS means of blocks."""
    for axis in (0, 1):
        edges = np.linspace(0, values.shape[axis], min(CELLS, values.shape[axis]) + 1).astype(int)
        parts = [values.take(range(a, b), axis).mean(axis) for a, b in itertools.pairwise(edges)]
        values = np.stack(parts, axis)
    return values


def _map_svg(name: str, values: np.ndarray) -> str:
    small = _averaged(values.astype(float))
    low, high = float(small.min()), float(small.max())
    rows, columns = small.shape
    size = max(2, 240 // max(rows, columns))
    cells = []
    for y in range(rows):
        for x in range(columns):
            share = (small[y, x] - low) / (high - low) if high > low else 0.0
            light = 95 - 70 * share
            cells.append(
                f'<rect x="{x * size}" y="{y * size}" width="{size}" height="{size}" '
                f'fill="hsl(215,60%,{light:.0f}%)"><title>px {x}, py {y}: {small[y, x]:,.0f}'
                "</title></rect>"
            )
    return (
        f'<figure class="map"><svg width="{columns * size}" height="{rows * size}">'
        f"{''.join(cells)}</svg><figcaption>{escape.escape(name)}: {low:,.0f} to {high:,.0f}"
        "</figcaption></figure>"
    )


def _bar(report: Report) -> str:
    total, x, parts, legend = sum(report.phases.values()) or 1.0, 0.0, [], []
    for n, (name, cycles) in enumerate(report.phases.items()):
        width, colour = 900 * cycles / total, _COLOURS[n % len(_COLOURS)]
        label = escape.escape(f"{name}: {cycles:,.0f} cycles, {cycles / total:.1%}")
        parts.append(
            f'<rect x="{x:.2f}" y="0" width="{width:.2f}" height="28" fill="{colour}">'
            f"<title>{label}</title></rect>"
        )
        legend.append(f'<li><span style="background:{colour}"></span>{label}</li>')
        x += width
    return (
        f'<svg class="phases" width="900" height="28">{"".join(parts)}</svg>'
        f'<ul class="legend">{"".join(legend)}</ul>'
    )


def _timeline(report: Report) -> str:
    if not report.timeline:
        return ""
    names = list(dict.fromkeys(span[0] for span in report.timeline))[:32]
    phases = list(dict.fromkeys(span[2] for span in report.timeline))
    end = max(span[4] for span in report.timeline) or 1
    rects = []
    for core, thread, phase, start, stop in report.timeline:
        if core in names:
            y = names.index(core) * 14
            rects.append(
                f'<rect x="{120 + 780 * start / end:.2f}" y="{y}" '
                f'width="{max(780 * (stop - start) / end, 0.4):.2f}" height="11" '
                f'fill="{_COLOURS[phases.index(phase) % len(_COLOURS)]}"><title>{core}, thread '
                f"{thread}, {escape.escape(phase)}: {start} to {stop}</title></rect>"
            )
    labels = [f'<text x="0" y="{n * 14 + 10}">{name}</text>' for n, name in enumerate(names)]
    return (
        f'<h2>Timeline</h2><svg class="timeline" width="900" height="{len(names) * 14}">'
        f"{''.join(labels + rects)}</svg>"
    )


def _table(reports: list[Report]) -> str:
    head = "".join(
        f"<th>{h}</th>"
        for h in ("what", "machine", "grid", "cycles", "against the first", "tokens/s", "SRAM/core")
    )
    first, lines = reports[0].cycles or 1.0, []
    for r in reports:
        cells = (
            escape.escape(r.what),
            escape.escape(r.spec.name),
            f"{r.rows} x {r.columns}",
            f"{r.cycles:,.0f}",
            f"{r.cycles / first:.2f}x",
            f"{r.tokens_per_second:,.1f}" if r.tokens else "",
            f"{r.peak_sram_bytes:,} B" + ("" if r.fits else ", does not fit"),
        )
        lines.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:24px auto;max-width:960px;color:#222}
table{border-collapse:collapse}td,th{padding:3px 10px;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}.map{display:inline-block;margin:8px 16px 8px 0}
figcaption{font-size:12px}.legend{columns:2;list-style:none;padding:0}
.legend span{display:inline-block;width:11px;height:11px;margin-right:6px}text{font-size:10px}
"""


def html(report: Report, compare: list[Report]) -> str:
    """The report as one HTML document: totals, phases, maps, timeline, what-if table."""
    notes = "".join(f"<li>{escape.escape(n)}</li>" for n in report.notes)
    maps = "".join(_map_svg(name, values) for name, values in report.maps.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape.escape(report.what)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape.escape(report.what)}</h1><p>{report.cycles:,.0f} modelled cycles on "
        f"{report.rows} x {report.columns} cores of {escape.escape(report.spec.name)}; "
        f"{report.seconds * 1e6:,.2f} us at {report.spec.clock_hz / 1e9:g} GHz. These are a "
        f"model's cycles, not a measurement.</p><ul>{notes}</ul><h2>Phases</h2>{_bar(report)}"
        + (f"<h2>Cores</h2>{maps}" if maps else "")
        + _timeline(report)
        + f"<h2>Beside others</h2>{_table([report, *compare])}</body></html>\n"
    )

"""Reports as pictures: heat maps of the cores as PNG, and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import itertools
import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from .report import Report

CELLS = 1024  # a map is averaged down to at most this many cells per side
LANES = 28  # cores that a timeline shows at most, spread over those that ran
MAIN = 8  # the main thread's number in timelines
WIDTH = 1000  # of the drawings, in their own units; the page scales them
_PALETTE = ("#3b6ea5", "#e08a2e", "#4f9a5f", "#b5504c", "#7d64a8", "#2f9c9c", "#c26a9b", "#8a8f98",
            "#a98b3c", "#5b7f3a", "#9a5a3a", "#56658c")  # fmt: skip
# Dark to bright, even in lightness: five stops between which colours are mixed.
_SCALE = np.array([(38, 26, 78), (58, 82, 139), (33, 145, 140), (115, 200, 98), (253, 231, 80)])


_UNITS = {"hops": "words", "SRAM": "bytes"}  # of maps; all others are in cycles


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
    from matplotlib import colors, pyplot, ticker

    scale = colors.LinearSegmentedColormap.from_list("cores", _SCALE / 255)
    columns = min(3, len(report.maps))
    rows = math.ceil(len(report.maps) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.3 * columns, 3.7 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, values) in zip(axes.flat, report.maps.items(), strict=False):
        axis.set_axis_on()
        low, high = float(values.min()), float(values.max())
        title = f"{name} ({_UNITS.get(name, 'cycles')})"
        if low == high:  # a map of one value has a scale too
            title, low = f"{title}: {low:,.0f} on every core", 0.0
        picture = axis.imshow(
            values, cmap=scale, interpolation="nearest", vmin=low, vmax=max(high, low + 1)
        )
        whole = ticker.MaxNLocator(nbins=6, integer=True)
        figure.colorbar(picture, ax=axis, shrink=0.85, format="{x:,.0f}", ticks=whole)
        axis.set(title=title, xlabel="px", ylabel="py")
        for side in (axis.xaxis, axis.yaxis):
            side.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{report.what}\n{report.cycles:,.0f} modelled cycles on {report.spec.name}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---- parts of the page --------------------------------------------------------------------------


def _short(value: float) -> str:
    """1,234 below ten thousand, then 12.3 k, 4.56 M, ..."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g} {unit}"
    return f"{value:,.0f}" if value == round(value) or value >= 100 else f"{value:.3g}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds * 1e9:.4g} ns"


def _cards(report: Report) -> str:
    limit = report.spec.sram_bytes - report.spec.sram_reserved
    share = report.peak_sram_bytes / limit
    cards = [
        ("modelled cycles", f"{report.cycles:,.0f}", f"on {report.rows} x {report.columns} cores"),
        ("time", _time(report.seconds), f"at {report.spec.clock_hz / 1e9:g} GHz"),
    ]
    if report.tokens:
        cards.append(("tokens/s", f"{report.tokens_per_second:,.1f}", "all requests together"))
    if report.macs:
        cards.append(
            ("utilization", f"{report.utilization:.2%}", "of the multiply-adds these cores can do")
        )
    if report.words:
        cards.append(("words sent", _short(report.words), f"{_short(report.hops)} over links"))
    body = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span>'
        f"<small>{escape(note)}</small></div>"
        for name, value, note in cards
    )
    state, word = ("fits", "fits") if report.fits else ("over", "does not fit")
    return (
        f'<div class="cards">{body}<div class="card {state}"><b>{share:.0%}</b>'
        f"<span>of a core's memory: {word}</span><small>{report.peak_sram_bytes:,} of {limit:,} B"
        f'</small><div class="gauge"><i style="width:{min(share, 1):.1%}"></i></div></div></div>'
    )


def _phases(report: Report) -> str:
    total, x, parts, rows = sum(report.phases.values()) or 1.0, 0.0, [], []
    for n, (name, cycles) in enumerate(report.phases.items()):
        width, colour = WIDTH * cycles / total, _PALETTE[n % len(_PALETTE)]
        label = escape(f"{name}: {cycles:,.0f} cycles, {cycles / total:.1%}")
        parts.append(
            f'<rect x="{x:.2f}" y="0" width="{width:.2f}" height="34" fill="{colour}">'
            f"<title>{label}</title></rect>"
        )
        if width > 7 * len(name) + 10:
            parts.append(f'<text x="{x + 6:.2f}" y="22" fill="#fff">{escape(name)}</text>')
        rows.append(
            f'<tr><td><i class="dot" style="background:{colour}"></i>{escape(name)}</td>'
            f"<td>{cycles:,.0f}</td><td>{cycles / total:.1%}</td>"
            f'<td class="bar"><i style="width:{cycles / total:.2%};background:{colour}"></i>'
            "</td></tr>"
        )
        x += width
    return (
        f'<svg class="phases" viewBox="0 0 {WIDTH} 34">{"".join(parts)}</svg>'
        '<table class="fill"><thead><tr><th>phase</th><th>cycles</th><th>share</th><th></th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _averaged(values: np.ndarray) -> np.ndarray:
    """At most CELLS x CELLS means of blocks."""
    for axis in (0, 1):
        edges = np.linspace(0, values.shape[axis], min(CELLS, values.shape[axis]) + 1).astype(int)
        parts = [values.take(range(a, b), axis).mean(axis) for a, b in itertools.pairwise(edges)]
        values = np.stack(parts, axis)
    return values


def _png(share: np.ndarray) -> str:
    """Data URI of values in 0..1 as colours, one pixel each."""
    stops = np.linspace(0, 1, len(_SCALE))
    colours = np.stack([np.interp(share, stops, _SCALE[:, c]) for c in range(3)], -1)
    rows, columns = share.shape
    raw = b"".join(b"\0" + row.tobytes() for row in colours.round().astype(np.uint8))

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw))
    return "data:image/png;base64," + base64.b64encode(data + chunk(b"IEND", b"")).decode()


_READING = (
    "<p>A core each, px to the right, py downwards; colours go from a map's least value to its "
    "greatest.</p>"
)


def _map(report: Report, name: str) -> str:
    values = _averaged(report.maps[name].astype(float))
    low, high = float(values.min()), float(values.max())
    share = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    rows, columns = report.maps[name].shape
    ratio = min(max(columns / rows, 0.2), 5.0)
    sharp = "pixelated" if columns < 200 else "auto"
    below = f"<p>{_short(low)} on every core</p>"
    if high > low:
        found = report.imbalance(name)
        below = (
            f'<div class="scale"></div><p class="ends"><span>{_short(low)}</span><span>'
            f"{_short(high)}</span></p><p>mean {_short(found['mean'])}, p95 "
            f"{_short(found['p95'])},<br>max/mean {found['max/mean']:.2f}</p>"
        )
    return (
        f"<figure><figcaption>{escape(name)} <small>{_UNITS.get(name, 'cycles')}</small>"
        f'</figcaption><img alt="{escape(name)} of {rows} x '
        f'{columns} cores" style="aspect-ratio:{ratio:.3f};image-rendering:{sharp}" '
        f'src="{_png(share)}">{below}</figure>'
    )


def _ticks(end: float) -> list[float]:
    """About eight round numbers from 0 to end."""
    step = 10 ** math.floor(math.log10(max(end, 1) / 4))
    step *= next(n for n in (1, 2, 5, 10) if end / (n * step) <= 9)
    return [n * step for n in range(int(end // step) + 1)]


def _axis(end: float, left: float, top: float, height: float) -> str:
    scale = (WIDTH - left) / (end or 1)
    return "".join(
        f'<line x1="{left + t * scale:.1f}" x2="{left + t * scale:.1f}" y1="{top}" '
        f'y2="{top + height}" class="grid"/><text x="{left + t * scale + 3:.1f}" y="{top - 4}" '
        f'class="tick">{_short(t) if left + t * scale < WIDTH - 45 else ""}</text>'
        for t in _ticks(end)
    )


def _place(core: str) -> list[int]:
    """A core's name, "px 3, py 0", as what it sorts by: rows first."""
    return [int(n) for n in re.findall(r"\d+", core)][::-1]


def _timeline(report: Report) -> str:
    """Cores over time where some were simulated, else the phases one after the other."""
    if report.timeline:
        cores = sorted({span[0] for span in report.timeline}, key=_place)
        lines = cores[:: max(1, -(-len(cores) // LANES))]
        spans = [s for s in report.timeline if s[0] in set(lines)]
        end = max(s[4] for s in spans)
        some = f"{len(lines)} of {len(cores)} cores. " if len(lines) < len(cores) else ""
        note = some + (
            "A bar is an instruction from its launch to its end, waiting for words included; "
            "microthreads lie below the main thread."
        )
    else:
        lines = list(report.phases)
        ends = list(itertools.accumulate(report.phases.values(), initial=0.0))
        spans = [
            (name, MAIN, name, *ab)
            for name, ab in zip(lines, itertools.pairwise(ends), strict=True)
        ]
        end, note = ends[-1] or 1, "The phases one after the other."
    names = list(dict.fromkeys([*report.phases, *(s[2] for s in spans)]))
    colours = {name: _PALETTE[n % len(_PALETTE)] for n, name in enumerate(names)}
    left, lane, top = max(168, 12 + 7 * max(map(len, lines), default=0)), 18, 24
    scale = (WIDTH - left) / (end or 1)
    marks = [
        f'<text x="0" y="{top + n * lane + 12}">{escape(line)}</text>'
        for n, line in enumerate(lines)
    ]
    lanes = {line: top + n * lane for n, line in enumerate(lines)}
    for core, thread, phase, start, stop in spans:
        main = thread == MAIN
        marks.append(
            f'<rect x="{left + start * scale:.2f}" y="{lanes[core] + (1 if main else 11)}" '
            f'width="{max((stop - start) * scale, 0.6):.2f}" height="{9 if main else 5}" '
            f'fill="{colours[phase]}"><title>{escape(core)}, '
            f"{'main thread' if main else f'microthread {thread}'}, {escape(phase)}: "
            f"{start:,.0f} to {stop:,.0f}</title></rect>"
        )
    legend = "".join(
        f'<span><i class="dot" style="background:{colours[name]}"></i>{escape(name)}</span>'
        for name in names
        if report.timeline
    )
    height = top + lane * len(lines)
    return (
        f'<p>{note} Time in cycles.</p><p class="legend">{legend}</p>'
        f'<svg class="timeline" viewBox="0 0 {WIDTH} {height + 4}">'
        f"{_axis(end, left, 20, height - 20)}{''.join(marks)}</svg>"
    )


def _table(reports: Sequence[Report]) -> str:
    tokens = any(r.tokens for r in reports)
    names = ("what", "machine", "grid", "cycles", "", "times the first", "tokens/s", "memory")
    head = "".join(f"<th>{h}</th>" for h in names if tokens or h != "tokens/s")
    first, most = reports[0].cycles or 1.0, max(r.cycles for r in reports) or 1.0
    least = min((r.cycles for r in reports if r.fits), default=None)
    lines = []
    for r in reports:
        used = r.peak_sram_bytes / (r.spec.sram_bytes - r.spec.sram_reserved)
        best = ' class="best"' if r.fits and r.cycles == least else ""
        rate = f"<td>{r.tokens_per_second:,.1f}</td>" if tokens else ""
        lines.append(
            f"<tr{best}><td>{escape(r.what)}</td><td>{escape(r.spec.name)}</td>"
            f"<td>{r.rows} x {r.columns}</td><td>{r.cycles:,.0f}</td>"
            f'<td class="bar"><i style="width:{r.cycles / most:.2%}"></i></td>'
            f"<td>{r.cycles / first:.2f}</td>{rate}"
            + ("<td>" if r.fits else '<td class="over" title="does not fit">')
            + f"{used:.0%}{'' if r.fits else ' over'}</td></tr>"
        )
    body = "".join(lines)
    return f'<table class="fill"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


_STYLE = """
:root{--ink:#20242b;--soft:#68707d;--line:#e3e6ea;--accent:#3b6ea5;--bad:#b5504c;--good:#4f9a5f}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,"DejaVu Sans",sans-serif;color:var(--ink);margin:0;background:#f6f7f9}
main{max-width:1080px;margin:0 auto;padding:28px 24px 48px}
h1{font-size:26px;margin:0 0 2px}h2{font-size:18px;margin:0 0 12px}
h3{font-size:15px;margin:20px 0 6px}p{margin:6px 0;color:var(--soft)}
section{background:#fff;border:1px solid var(--line);border-radius:10px;padding:18px 20px;
margin-top:18px;overflow-x:auto}
svg{width:100%;height:auto;display:block}
svg text{font:12px system-ui,"DejaVu Sans",sans-serif;fill:var(--ink)}svg.phases text{fill:#fff}
svg .tick{fill:var(--soft);font-size:11px}svg .grid{stroke:var(--line)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:18px}
.card{background:#fff;border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.card b{display:block;font-size:22px;line-height:1.25}.card span,.card small{display:block}
.card small{color:var(--soft)}.card.over b,td.over{color:var(--bad)}.card.fits b{color:var(--good)}
.gauge{height:6px;background:var(--line);border-radius:3px;margin-top:6px;overflow:hidden}
.gauge i{display:block;height:100%;background:var(--good)}.over .gauge i{background:var(--bad)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}table.fill{width:100%}
th{font-weight:600;color:var(--soft);font-size:13px}
td,th{padding:4px 8px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
td:first-child,th:first-child{text-align:left;padding-left:0;white-space:normal}.phases+table{margin-top:10px}
td.bar{width:20%;min-width:60px}
td.bar i{display:block;height:10px;border-radius:2px;background:var(--accent);min-width:1px}
tr.best td{font-weight:600}
.dot{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:8px}
.legend span{margin-right:18px}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(180px,1fr));gap:22px}
figure{margin:0}figure img{width:100%;display:block;border-radius:4px}
figcaption{font-weight:600;margin-bottom:4px}
figcaption small{font-weight:400;color:var(--soft)}figure p{font-size:12.5px;margin:2px 0}
.ends{display:flex;justify-content:space-between}
.scale{height:8px;margin-top:6px;border-radius:4px;background:linear-gradient(90deg,GRADIENT)}
ul.notes{margin:12px 0 0;padding-left:20px}
footer{margin-top:18px;font-size:13px;color:var(--soft)}
""".replace("GRADIENT", ",".join(f"rgb({r},{g},{b})" for r, g, b in _SCALE))


def html(report: Report, compare: Sequence[Report] | Mapping[str, Sequence[Report]] = ()) -> str:
    """The report as one HTML document: totals, phases, maps, timeline, what-if tables.

    compare: reports beside this one, or by the question that they answer; each makes a table.
    """
    if not isinstance(compare, Mapping):
        compare = {"": compare}
    reading = "<p>Bold: the fastest that fits. Over: a core's memory does not suffice.</p>"
    tables = "".join(
        (f"<h3>{escape(question)}</h3>" if question else "") + _table([report, *others])
        for question, others in compare.items()
        if others
    )
    notes = "".join(f"<li>{escape(n)}</li>" for n in report.notes)
    parts = [
        ("Phases", _phases(report) if report.phases else ""),
        ("Cores", "".join(_map(report, name) for name in report.maps)),
        ("Timeline", _timeline(report) if report.phases or report.timeline else ""),
        ("What if", tables and reading + tables),
    ]
    sections = "".join(
        f"<section><h2>{title}</h2>"
        + (f'{_READING}<div class="maps">{body}</div>' if title == "Cores" else body)
        + "</section>"
        for title, body in parts
        if body
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(report.what)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{escape(report.what)}</h1><p>{escape(report.spec.name)}, {report.rows} x "
        f"{report.columns} cores, modelled with cgpt-kernels: cycles of a model, not a measurement."
        f"</p>{_cards(report)}"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + f"{sections}<footer>What is modelled, from which constants, and how far it is from what "
        "was published: docs/wafer-model.md, <code>cgpt-kernels wafer validate</code>.</footer>"
        "</main></body></html>\n"
    )

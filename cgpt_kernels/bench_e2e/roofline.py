"""The roofline of a machine with a point per system: FLOP/s over FLOP per byte."""

from __future__ import annotations

from pathlib import Path

from .report import rows_of
from .targets import seconds

_MARKERS = {"prefill": "o", "decode": "s"}


def points(group: dict) -> list[dict]:
    """{"title", "metric", "work", "intensity", "rate"} of each system's prefills and steps.

    Intensity is the least work's: FLOP per byte that has to be read. Rate: FLOP/s by the median.
    """
    found = []
    for row in rows_of(group):
        loads = [("prefill", row.prefill_flops, row.prefill_bytes)]
        if row.token_median is not None:
            loads.append(("decode", row.token_flops, row.token_bytes))
        for metric, flops, nbytes in loads:
            found.append(
                {
                    "title": row.title,
                    "metric": metric,
                    "work": row.work,
                    "intensity": flops / nbytes,
                    "rate": flops / seconds(row, metric),
                }
            )
    return found


def draw(path: Path, groups: dict) -> Path:
    """One panel per format, as PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(groups), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    titles = list(dict.fromkeys(p["title"] for g in groups.values() for p in points(g)))
    colours = {title: f"C{i}" for i, title in enumerate(titles)}
    for panel, (kind, group) in enumerate(groups.items(), start=1):
        axes = figure.add_subplot(1, len(groups), panel)
        _panel(axes, kind, group, colours)
    marks = [
        figure.axes[0].plot([], [], marker="o", linestyle="", color=colours[t], label=t)[0]
        for t in titles
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _panel(axes, kind: str, group: dict, colours: dict[str, str]) -> None:
    found, peaks = points(group), group["peaks"]
    peak, bandwidth = peaks["flops"][kind], peaks["bandwidth"]
    low = min([p["intensity"] for p in found], default=1) / 3
    high = max([p["intensity"] for p in found], default=1e3) * 3
    ridge = peak / bandwidth
    xs = sorted({low, min(max(ridge, low), high), high})
    axes.plot(xs, [min(peak, x * bandwidth) for x in xs], color="black", linewidth=1)
    for p in found:
        axes.plot(
            *(p["intensity"], p["rate"]),
            marker=_MARKERS[p["metric"]],
            markersize=7,
            color=colours[p["title"]],
            fillstyle="full" if p["title"].startswith("ours") else "none",
            linestyle="",
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", title=kind)
    axes.set_ylabel("FLOP/s (circles prefill, squares decode, filled ours)")
    axes.annotate(
        f"{peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s",
        (0.98, 0.02),
        xycoords="axes fraction",
        ha="right",
        fontsize=8,
    )
    axes.grid(which="both", alpha=0.2)

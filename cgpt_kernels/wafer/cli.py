"""`cgpt-kernels wafer ...`: estimates, products, collectives, sweeps, validation, reports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from .report import Report

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
_Model = Annotated[
    str,
    typer.Option(
        help="A preset such as gpt2 or cerebras-gpt-13b, or llama3-8b or qwen2-72b, the shapes "
        "that WaferLLM ran."
    ),
]
_Spec = Annotated[str, typer.Option(help="The machine: wse2 or wse3.")]
_Grid = Annotated[
    str,
    typer.Option(help="ROWSxCOLUMNS of cores: at most 994x750 on WSE-2, 1160x750 on WSE-3."),
]
_Mode = Annotated[
    str,
    typer.Option(help="decode (one token per request), prefill (all of the context) or train."),
]
_Parallel = Annotated[
    str,
    typer.Option(
        help="tensor (every layer on all cores), pipeline (each layer its own rectangle), sequence "
        "(parts of the context on groups of rows) or streaming (weights come from outside)."
    ),
]
_Context = Annotated[int, typer.Option(min=1, help="Tokens that each token attends to.")]
_Json = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
_Html = Annotated[
    Path | None,
    typer.Option(help="Write one HTML file too: phases, cores, timeline, what-if tables."),
]


def _pair(name: str, text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not found:
        raise ValueError(f"wafer: --{name} must be ROWSxCOLUMNS, e.g. 660x660, got {text!r}")
    return int(found[1]), int(found[2])


def _size(text: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if not found or not all(map(int, found.groups())):
        raise ValueError(f"wafer: --size must be MxKxN, e.g. 2048x2048x2048, got {text!r}")
    return tuple(map(int, found.groups()))


def _config(model: str):
    """A GPT preset, or one of the two published LLaMA-like shapes."""
    from .model import LLAMA3_8B, QWEN2_72B

    shapes = {"llama3-8b": LLAMA3_8B, "qwen2-72b": QWEN2_72B}
    if model.lower() in shapes:
        return shapes[model.lower()]
    import cgpt_kernels

    try:
        return cgpt_kernels.GPTConfig.from_name(model)
    except ValueError as error:
        raise ValueError(f"{error}, {', '.join(shapes)}") from None


def _save(report: Report, trace, heatmap, html, what_if) -> None:
    """The files asked for; what_if() is called only where a page is written."""
    if trace is not None:
        report.save_trace(trace)
    if heatmap is not None:
        report.save_heatmap(heatmap)
    if html is not None:
        report.save_html(html, compare=what_if())
    for path in filter(None, (trace, heatmap, html)):
        typer.echo(f"written to {path}", err=True)


_Trace = Annotated[
    Path | None, typer.Option(help="Write a trace for ui.perfetto.dev, a microsecond per cycle.")
]
_Heatmap = Annotated[
    Path | None, typer.Option(help="Write a PNG: compute, communication, idle, memory by core.")
]
LOGGED = 200_000  # events of simulated cores at most, for traces and timelines


@app.callback()
def main() -> None:
    """A modelled wafer-scale engine: cycles of products, collectives and whole models.

    Nothing here is measured: programs run on a model of the machine, wavelet by wavelet where the
    grid is small, from representative rows and columns where it is large. `validate` says how far
    that is from what was published.

    \b
    # What does a token of a 13B model cost on 660 x 660 cores, and does the model fit?
    cgpt-kernels wafer estimate --model cerebras-gpt-13b --spec wse2 --mode decode --grid 660x660
    # Which algorithm for a product? What does the better one look like, core by core?
    cgpt-kernels wafer gemm --size 2048x2048x2048 --grid 64x64
    cgpt-kernels wafer gemm --size 128x128x128 --grid 16x16 --algorithm mesh --html gemm.html
    # How long does a sum over 512 cores take?
    cgpt-kernels wafer collective --kind reduce --shape 1x512 --words 256
    # The same over many grids, machines, algorithms, as a table:
    cgpt-kernels wafer sweep --model cerebras-gpt-1.3b --grids 200x200,400x400 --out sweep.csv
    cgpt-kernels wafer sweep --size 4096x4096x4096 --grids 360x360,720x720 --json
    # One page to show around:
    cgpt-kernels wafer report --model llama3-8b --grid 660x660 --out report.html
    # How far off is all this?
    cgpt-kernels wafer validate
    """


@app.command("estimate")
def estimate_command(
    model: _Model,
    grid: _Grid,
    spec: _Spec = "wse2",
    mode: _Mode = "decode",
    parallel: _Parallel = "tensor",
    batch: Annotated[int, typer.Option(min=1, help="Requests or sequences at once.")] = 1,
    context: _Context = 2048,
    groups: Annotated[
        int | None, typer.Option(min=1, help="Of the K-tree collectives; default about sqrt(P).")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of nonzero weights (streaming).")] = 1.0,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Train: keep what enters each block only.")
    ] = False,
    as_json: _Json = False,
    trace: _Trace = None,
    heatmap: _Heatmap = None,
    html: _Html = None,
) -> None:
    """Cycles of a whole model by phase, and whether it fits.

    \b
    cgpt-kernels wafer estimate --model cerebras-gpt-13b --grid 660x660
    cgpt-kernels wafer estimate --model llama3-8b --grid 480x480 --mode prefill --context 4096
    cgpt-kernels wafer estimate --model cerebras-gpt-13b --grid 750x750 --parallel streaming
    """
    from .model import estimate
    from .spec import preset
    from .whatif import of_estimate

    options = {"mode": mode, "parallel": parallel, "batch": batch, "context": context}
    options |= {"groups": groups, "density": density, "recompute": recompute}
    config, sides, machine = _config(model), _pair("grid", grid), preset(spec)
    report = estimate(config, spec=machine, grid=sides, **options)
    report.what = f"{model}: {report.what}"
    typer.echo(report.to_json() if as_json else str(report))
    given = (model, config, sides, machine)
    _save(report, trace, heatmap, html, lambda: of_estimate(*given, **options))


@app.command("gemm")
def gemm_command(
    size: Annotated[str, typer.Option(help="MxKxN: [M, K] times [K, N].")],
    grid: _Grid,
    algorithm: Annotated[
        str, typer.Option(help="summa, cannon, mesh (MeshGEMM), or all side by side.")
    ] = "all",
    dtype: Annotated[str, typer.Option(help="fp16 or fp32.")] = "fp16",
    transposed_b: Annotated[
        bool, typer.Option("--transposed-b", help="The program for a b^T beside them.")
    ] = False,
    spec: _Spec = "wse2",
    as_json: _Json = False,
    trace: _Trace = None,
    heatmap: _Heatmap = None,
    html: _Html = None,
) -> None:
    """Cycles of a product, one algorithm or all side by side.

    Core (py, px) owns one tile of the result. Up to 16 x 16 cores every wavelet is simulated and
    the page shows the cores; beyond, two rows stand for the grid.

    \b
    cgpt-kernels wafer gemm --size 2048x2048x2048 --grid 64x64
    cgpt-kernels wafer gemm --size 128x128x128 --grid 16x16 --algorithm cannon --html cannon.html
    """
    from .. import checks
    from .ops import gemm_report, transposed_report
    from .spec import check_grid, preset
    from .tiles import ALGORITHMS
    from .whatif import of_gemm

    M, K, N = _size(size)
    checks.is_choice("wafer", "--algorithm", algorithm, (*ALGORITHMS, "all"))
    checks.is_choice("wafer", "--dtype", dtype, ("fp16", "fp32"))
    machine, (rows, columns) = preset(spec), _pair("grid", grid)
    check_grid("wafer", machine, (rows, columns))
    itemsize = 2 if dtype == "fp16" else 4
    names = ALGORITHMS if algorithm == "all" else (algorithm,)
    log = LOGGED if trace or html else 0
    sizes = (M, K, N, itemsize, (rows, columns))
    reports = [gemm_report(*sizes, name, machine, log) for name in names]
    if transposed_b:
        reports.append(transposed_report(M, K, N, itemsize, (rows, columns), machine))
    if as_json:
        typer.echo(json.dumps([r.to_dict() for r in reports], indent=1))
    else:
        typer.echo("\n".join(map(str, reports)))
    _save(reports[0], trace, heatmap, html, lambda: of_gemm(*sizes, names[0], machine))


@app.command("collective")
def collective_command(
    kind: Annotated[str, typer.Option(help="broadcast, reduce or allreduce.")],
    shape: Annotated[str, typer.Option(help="Rows x columns; a line is 1xP.")],
    words: Annotated[int, typer.Option(min=1, help="32-bit words per core.")],
    algorithm: Annotated[
        str,
        typer.Option(
            help="auto (the cheapest by the formulas), star, chain, tree, preorder, two_phase, "
            "ktree; ring for allreduce, flood for broadcast."
        ),
    ] = "auto",
    relay: Annotated[
        str, typer.Option(help="What a stop on the way is: one instruction, or a task.")
    ] = "instruction",
    groups: Annotated[
        int | None, typer.Option(min=1, help="Of two_phase and ktree; default about sqrt(P).")
    ] = None,
    spec: _Spec = "wse2",
    as_json: _Json = False,
    trace: _Trace = None,
    heatmap: _Heatmap = None,
    html: _Html = None,
) -> None:
    """Simulate one collective, wavelet by wavelet.

    The trace opens in Perfetto (ui.perfetto.dev): one process per core, one thread per microthread.

    \b
    cgpt-kernels wafer collective --kind reduce --shape 1x512 --words 256
    cgpt-kernels wafer collective --kind allreduce --shape 16x16 --words 33 --algorithm ktree \\
      --trace allreduce.json --heatmap allreduce.png --html allreduce.html
    """
    from .collectives import simulate
    from .spec import preset
    from .whatif import of_collective

    log = LOGGED if trace or html else 0
    sides, machine = _pair("shape", shape), preset(spec)
    report, _ = simulate(kind, algorithm, sides, words, machine, relay, groups, log=log)
    typer.echo(report.to_json() if as_json else str(report))
    chosen = report.what.split()[1].rstrip(",")
    arguments = (kind, chosen, sides, words, machine, relay, groups)
    _save(report, trace, heatmap, html, lambda: of_collective(*arguments))


def _list(text: str | None, default: str = "") -> list[str]:
    return [part.strip() for part in (text or default).split(",") if part.strip()]


@app.command("sweep")
def sweep_command(
    grids: Annotated[str, typer.Option(help="Comma-separated ROWSxCOLUMNS.")],
    model: Annotated[str | None, typer.Option(help="Sweep a model, named as in estimate.")] = None,
    size: Annotated[str | None, typer.Option(help="Sweep a product, MxKxN.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="Sweep a collective: broadcast, reduce or allreduce.")
    ] = None,
    specs: Annotated[str, typer.Option(help="Machines, comma-separated.")] = "wse2,wse3",
    modes: Annotated[str, typer.Option(help="Of a model, comma-separated.")] = "decode",
    parallels: Annotated[str, typer.Option(help="Of a model, comma-separated.")] = "tensor",
    algorithms: Annotated[
        str | None,
        typer.Option(help="Of a product (default all) or collective (default auto)."),
    ] = None,
    words: Annotated[str, typer.Option(help="Of a collective, comma-separated.")] = "1",
    groups: Annotated[
        str | None, typer.Option(help="Of K-tree and two-phase collectives, comma-separated.")
    ] = None,
    context: _Context = 2048,
    as_json: _Json = False,
    out: Annotated[
        Path | None, typer.Option(help="File to write, JSON if it ends so; default stdout.")
    ] = None,
) -> None:
    """A table over grids, machines, modes, algorithms: one row each, CSV or JSON.

    A combination that the machine does not allow is a row with its error in the last column.

    \b
    cgpt-kernels wafer sweep --model cerebras-gpt-1.3b --grids 200x200 --modes decode,prefill
    cgpt-kernels wafer sweep --model llama3-8b --grids 420x420 --groups 10,20,30 --specs wse2
    cgpt-kernels wafer sweep --size 4096x4096x4096 --grids 360x360,720x720
    cgpt-kernels wafer sweep --kind reduce --grids 1x64,1x512 --words 1,256 --algorithms chain,tree
    """
    from .collectives import collective
    from .model import estimate
    from .ops import gemm_report
    from .spec import check_grid, preset
    from .sweep import as_csv, sweep
    from .tiles import ALGORITHMS

    if sum(subject is not None for subject in (model, size, kind)) != 1:
        raise ValueError("wafer: sweep takes one of --model, --size and --kind")
    count = [int(g) if g.isdigit() else g for g in _list(groups)] or [None]
    sides = [_pair("grids", g) for g in _list(grids)]
    axes = {"spec": _list(specs), "grid": sides}
    if model is not None:
        config = _config(model)
        axes |= {"mode": _list(modes), "parallel": _list(parallels), "groups": count}

        def make(spec, **options):
            return estimate(config, spec=preset(spec), context=context, **options)

    elif size is not None:
        M, K, N = _size(size)
        axes |= {"algorithm": _list(algorithms, ",".join(ALGORITHMS))}

        def make(spec, grid, algorithm):
            machine = preset(spec)
            check_grid("wafer", machine, grid)
            if algorithm not in ALGORITHMS:
                raise ValueError(
                    f"wafer: algorithm must be among {', '.join(ALGORITHMS)}, got {algorithm!r}"
                )
            return gemm_report(M, K, N, 2, grid, algorithm, machine)

    else:
        counts = [int(w) if w.isdigit() else w for w in _list(words)]
        axes |= {"algorithm": _list(algorithms, "auto"), "words": counts, "groups": count}

        def make(spec, grid, **options):
            return collective(kind, shape=grid, spec=preset(spec), **options)

    rows = sweep(model or size or kind, axes, make)
    as_json = as_json or (out is not None and out.suffix == ".json")
    text = json.dumps(rows, indent=1) + "\n" if as_json else as_csv(rows)
    if out is not None:
        out.write_text(text)
        typer.echo(f"{len(rows)} rows written to {out}", err=True)
    else:
        typer.echo(text, nl=False)


@app.command("validate")
def validate_command(
    kind: Annotated[
        list[str] | None, typer.Option(help="formula, micro, kernel or 'end to end'; repeat.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Published numbers beside the model's, with the error and the source of each."""
    from dataclasses import asdict

    from .validate import TARGETS, markdown, validate

    rows = validate(tuple(kind) if kind else tuple(TARGETS))
    if as_json:
        typer.echo(json.dumps([{**asdict(r), "error": r.error} for r in rows], indent=1))
    else:
        typer.echo(markdown(rows), nl=False)


@app.command("report")
def report_command(
    model: _Model,
    grid: _Grid,
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
    spec: _Spec = "wse2",
    mode: _Mode = "decode",
    parallel: _Parallel = "tensor",
    batch: Annotated[int, typer.Option(min=1, help="Requests or sequences at once.")] = 1,
    context: _Context = 2048,
) -> None:
    """One HTML file: phases, cores, timeline, and what-if tables, with nothing to load.

    \b
    cgpt-kernels wafer report --model cerebras-gpt-13b --grid 660x660 --out report.html
    """
    from .model import estimate
    from .spec import preset
    from .whatif import of_estimate

    config, sides, machine = _config(model), _pair("grid", grid), preset(spec)
    options = {"mode": mode, "parallel": parallel, "batch": batch, "context": context}
    report = estimate(config, spec=machine, grid=sides, **options)
    answers = of_estimate(model, config, sides, machine, **options)
    report.what = f"{model}: {report.what}"
    report.save_html(out, compare=answers)
    typer.echo(f"written to {out}", err=True)

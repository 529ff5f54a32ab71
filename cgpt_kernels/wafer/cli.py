"""`cgpt-kernels wafer ...`: estimates, products, collectives, sweeps, validation, reports."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from .report import Report

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
_Spec = Annotated[str, typer.Option(help="wse2 or wse3.")]
_Grid = Annotated[str, typer.Option(help="Rows x columns, e.g. 660x660.")]
_Json = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
_Html = Annotated[Path | None, typer.Option(help="Write the report as one HTML file too.")]


def _pair(name: str, text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not found:
        raise ValueError(f"wafer: --{name} must be ROWSxCOLUMNS, e.g. 660x660, got {text!r}")
    return int(found[1]), int(found[2])


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


def _show(report: Report, as_json: bool, html: Path | None = None, compare=()) -> None:
    typer.echo(report.to_json() if as_json else str(report))
    if html is not None:
        report.save_html(html, compare=list(compare))
        typer.echo(f"written to {html}", err=True)


@app.callback()
def main() -> None:
    """A modelled wafer-scale engine: cycles of products, collectives and whole models.

    \b
    cgpt-kernels wafer estimate --model cerebras-gpt-13b --spec wse2 --mode decode --grid 660x660
    cgpt-kernels wafer gemm --size 2048x2048x2048 --grid 64x64 --algorithm mesh
    cgpt-kernels wafer collective --kind reduce --shape 1x512 --words 256
    cgpt-kernels wafer sweep --model cerebras-gpt-1.3b --grids 200x200,400x400 --out sweep.csv
    cgpt-kernels wafer validate
    """


@app.command("estimate")
def estimate_command(
    model: Annotated[str, typer.Option(help="A preset, llama3-8b or qwen2-72b.")],
    grid: _Grid,
    spec: _Spec = "wse2",
    mode: Annotated[str, typer.Option(help="prefill, decode or train.")] = "decode",
    parallel: Annotated[
        str, typer.Option(help="tensor, pipeline, sequence or streaming.")
    ] = "tensor",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    context: Annotated[int, typer.Option(min=1)] = 2048,
    density: Annotated[float, typer.Option(help="Share of nonzero weights (streaming).")] = 1.0,
    as_json: _Json = False,
    html: _Html = None,
) -> None:
    """Cycles of a whole model by phase, and whether it fits."""
    from .model import estimate
    from .spec import PRESETS, preset

    options = {"mode": mode, "parallel": parallel, "batch": batch, "context": context}
    config, sides = _config(model), _pair("grid", grid)
    report = estimate(config, spec=preset(spec), grid=sides, density=density, **options)
    others = []
    if html is not None:
        others = [
            estimate(config, spec=other, grid=sides, density=density, **options)
            for other in PRESETS.values()
            if other is not report.spec
        ]
    _show(report, as_json, html, others)


@app.command("gemm")
def gemm_command(
    size: Annotated[str, typer.Option(help="MxKxN.")],
    grid: _Grid,
    algorithm: Annotated[str, typer.Option(help="summa, cannon, mesh or all.")] = "all",
    dtype: Annotated[str, typer.Option(help="fp16 or fp32.")] = "fp16",
    transposed_b: Annotated[
        bool, typer.Option("--transposed-b", help="The program for a b^T beside them.")
    ] = False,
    spec: _Spec = "wse2",
    as_json: _Json = False,
    html: _Html = None,
) -> None:
    """Cycles of a product, one algorithm or all side by side."""
    from .. import checks
    from .ops import gemm_report, transposed_report
    from .spec import preset
    from .tiles import ALGORITHMS

    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", size)
    if not found:
        raise ValueError(f"wafer: --size must be MxKxN, got {size!r}")
    checks.is_choice("wafer", "--algorithm", algorithm, (*ALGORITHMS, "all"))
    checks.is_choice("wafer", "--dtype", dtype, ("fp16", "fp32"))
    machine, (rows, columns) = preset(spec), _pair("grid", grid)
    machine.check_grid("wafer", rows, columns)
    M, K, N = map(int, found.groups())
    itemsize = 2 if dtype == "fp16" else 4
    names = ALGORITHMS if algorithm == "all" else (algorithm,)
    reports = [gemm_report(M, K, N, itemsize, (rows, columns), name, machine) for name in names]
    if transposed_b:
        reports.append(transposed_report(M, K, N, itemsize, (rows, columns), machine))
    if as_json:
        typer.echo(json.dumps([r.to_dict() for r in reports], indent=1))
    else:
        typer.echo("\n".join(map(str, reports)))
    if html is not None:
        reports[0].save_html(html, compare=reports[1:])


@app.command("collective")
def collective_command(
    kind: Annotated[str, typer.Option(help="broadcast, reduce or allreduce.")],
    shape: Annotated[str, typer.Option(help="Rows x columns; a line is 1xP.")],
    words: Annotated[int, typer.Option(min=1, help="32-bit words per core.")],
    algorithm: Annotated[str, typer.Option(help="auto or a name.")] = "auto",
    relay: Annotated[str, typer.Option(help="instruction or task.")] = "instruction",
    spec: _Spec = "wse2",
    as_json: _Json = False,
    trace: Annotated[Path | None, typer.Option(help="Write a Perfetto trace.")] = None,
    heatmap: Annotated[Path | None, typer.Option(help="Write a PNG of the cores.")] = None,
    html: _Html = None,
) -> None:
    """Simulate one collective, wavelet by wavelet."""
    from .collectives import simulate
    from .spec import preset

    log = 200_000 if trace or html else 0
    sides = _pair("shape", shape)
    report, _ = simulate(kind, algorithm, sides, words, preset(spec), relay, log=log)
    if trace is not None:
        report.save_trace(trace)
    if heatmap is not None:
        report.save_heatmap(heatmap)
    _show(report, as_json, html)


@app.command("sweep")
def sweep_command(
    model: Annotated[str, typer.Option(help="A preset, llama3-8b or qwen2-72b.")],
    grids: Annotated[str, typer.Option(help="Comma-separated ROWSxCOLUMNS.")],
    specs: Annotated[str, typer.Option(help="Comma-separated.")] = "wse2,wse3",
    modes: Annotated[str, typer.Option(help="Comma-separated.")] = "decode",
    parallels: Annotated[str, typer.Option(help="Comma-separated.")] = "tensor",
    context: Annotated[int, typer.Option(min=1)] = 2048,
    out: Annotated[Path | None, typer.Option(help="CSV file; default stdout.")] = None,
) -> None:
    """A table over grids, machines, modes and ways to spread; one CSV row each."""
    from .model import estimate
    from .spec import preset

    config, rows = _config(model), []
    choices = (specs.split(","), modes.split(","), parallels.split(","), grids.split(","))
    for spec, mode, parallel, grid in itertools.product(*choices):
        report = estimate(
            config,
            spec=preset(spec),
            grid=_pair("grids", grid),
            mode=mode,
            parallel=parallel,
            context=context,
        )
        rows.append(
            {
                "model": model,
                "spec": spec,
                "mode": mode,
                "parallel": parallel,
                "grid": grid,
                "cycles": round(report.cycles),
                "tokens_per_second": round(report.tokens_per_second, 2),
                "sram_bytes_per_core": report.peak_sram_bytes,
                "fits": report.fits,
            }
        )
    with out.open("w", newline="") if out else nullcontext(sys.stdout) as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


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
    model: Annotated[str, typer.Option(help="A preset, llama3-8b or qwen2-72b.")],
    grid: _Grid,
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
    context: Annotated[int, typer.Option(min=1)] = 2048,
) -> None:
    """One HTML file: decode by phase, beside prefill, the other machine, a smaller grid."""
    from .model import estimate
    from .spec import WSE2, WSE3

    config, (rows, columns) = _config(model), _pair("grid", grid)
    report = estimate(config, spec=WSE2, grid=(rows, columns), context=context)
    others = [
        estimate(config, spec=WSE3, grid=(rows, columns), context=context),
        estimate(config, spec=WSE2, grid=(rows, columns), context=context, mode="prefill"),
    ]
    if min(rows, columns) > 1:
        half = (rows // 2, columns // 2)
        others.append(estimate(config, spec=WSE2, grid=half, context=context))
    report.save_html(out, compare=others)
    typer.echo(f"written to {out}", err=True)

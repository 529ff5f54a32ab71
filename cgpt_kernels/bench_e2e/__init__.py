"""`cgpt-kernels bench e2e --peers`: whole models beside the other systems that run them.

All systems continue the same prompts with the same random weights in the same run, in turns; each
lives in a process of its own (workers.py, bench/peers). Systems of one format are compared with
each other; a system whose greedy tokens are not those of eager fp32 counts in no ratio.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from .. import timing
from . import measure, report, roofline, systems, targets

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def run(
    console: Console,
    *,
    model: str = "cerebras-gpt-111m",
    peers: str = "all",
    rounds: int = 5,
    new_tokens: int = 32,
    threads: int | None = None,
    out: str | Path | None = None,
    everything: bool = False,
    prepare: bool = False,
    only: Sequence[str] | None = None,
    works: Callable[[int], list[systems.Work]] = systems.works,
) -> bool:
    """Measure, show the tables, write JSON and a picture; True when no system of ours is red.

    Args:
        model: of GPTConfig.from_name.
        peers: see systems.select, e.g. "all", "all:bf16", "openvino,llama_cpp:int8".
        rounds: turns of each system.
        new_tokens: written after each prompt, at least 3.
        threads: of each system; None for torch's own number.
        out: JSON file; None for bench/results/<machine>/e2e-<model>.json. Formats of an earlier run
            that this one does not measure are kept in it. The picture lies beside it.
        everything: the prompt of 2048 tokens and the batch of 8 in every format, not in bf16 only.
        prepare: convert, compile and run everything once, and measure nothing.
        only: names of works; None for all. A large model's prompts take minutes in some systems.
    Raises:
        ValueError: unknown model, peer, work or format; fewer than 1 round or 3 tokens; OpenMP
            threads that never sleep.
        Failed: the checkpoint cannot be made, or no roof can be measured.
    """
    if rounds < 1 or new_tokens < 3:
        raise ValueError(
            f"bench: rounds must be at least 1 and new tokens 3, got {rounds} and {new_tokens}"
        )
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        raise ValueError(
            "bench: OMP_WAIT_POLICY must be passive or unset with --peers, got active: systems "
            "that wait for their turn would spin"
        )
    chosen = works(new_tokens)
    names = [work.name for work in chosen]
    if unknown := set(only or ()) - set(names):
        raise ValueError(f"bench: --work must be {', '.join(names)}, got {min(unknown)!r}")
    config = systems.helper("weights").config_of(model)
    found, absent = systems.resolve(systems.select(peers))
    job = measure.Run(
        name=model,
        config=config,
        folder=Path(tempfile.gettempdir()) / "cgpt-kernels-bench" / model,
        works=[work for work in chosen if not only or work.name in only],
        rounds=rounds,
        threads=threads or torch.get_num_threads(),
        everything=everything,
        show=lambda line: console.print(line, style="dim", markup=False, highlight=False),
    )
    job.show(f"weights and converted copies: {job.folder}")
    measure.make_checkpoint(job)
    if prepare:
        failed = measure.make_ready(job, found)
        _say(console, "Not ready", report.left_out(absent, failed))
        return not any(system.ours and system.key in failed for system in found)
    busy = timing.others_busy()
    if busy is not None and busy > timing.BUSY:
        console.print(f"other processes use {busy:.0%} of the cores: trust ratios at most")

    out = Path(out) if out else RESULTS / timing.machine_name() / f"e2e-{model}.json"
    groups = report.read(out)
    measured = list(dict.fromkeys(system.format for system in found))
    for kind in measured:
        group = measure.group(job, kind, [s for s in found if s.format == kind])
        group["absent"] = {f"{a.name}:{kind}": a.reason for a in absent if kind in a.formats}
        if kind == "bf16":
            group["single"] = measure.single_ops(job)
        groups[kind] = group
        console.print(report.systems_table(kind, group))
    verdicts = _judge(groups)
    console.print(report.targets_table(verdicts))
    failed = {key: why for kind in measured for key, why in groups[kind]["failed"].items()}
    _say(console, "Not run", report.left_out(absent, failed))
    _say(console, "What the numbers include", report.notes(found))
    _say(console, "Conditions", _conditions(job, groups, measured))
    written = report.write(out, model, groups, verdicts)
    _say(console, "Written", [str(written), _picture(out, groups)])
    return not any(row["ours"] and row["red"] for kind in measured for row in groups[kind]["rows"])


def _judge(groups: dict) -> list[targets.Verdict]:
    rows = [row for group in groups.values() for row in report.rows_of(group)]
    reasons = {
        key: why
        for group in groups.values()
        for key, why in {**group["absent"], **group["failed"]}.items()
    }
    single = groups.get("bf16", {})
    return targets.judge(rows, reasons) + targets.judge_single(
        single.get("single", []), single.get("peaks")
    )


def _conditions(job: measure.Run, groups: dict, measured: list[str]) -> list[str]:
    lines = [
        f"{timing.machine_cpu()}, {job.threads} threads, {job.name} with random weights, greedy; "
        f"medians of {job.rounds} rounds in turns; each system in a process of its own; "
        f"OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'unset')}",
        "bound: the larger of FLOP / measured rate and bytes / measured read bandwidth; a step "
        "reads every weight once, and keys and values",
    ]
    for kind in measured:
        peaks, idle = groups[kind]["peaks"], groups[kind]["idle_share"]
        others = max((row["others"] for row in groups[kind]["rows"]), default=0.0)
        lines.append(
            f"{kind}: {peaks['flops'][kind] / 1e9:.0f} GFLOP/s, "
            f"{peaks['bandwidth'] / 1e9:.1f} GB/s; waiting systems used at most {idle:.1%} of a "
            f"core, processes outside the run at most {others:.0%} of all cores"
        )
    return lines


def _picture(out: Path, groups: dict) -> str:
    try:
        return str(roofline.draw(out.with_suffix(".png"), groups))
    except ImportError:
        return "no picture: pip install matplotlib"


def _say(console: Console, title: str, lines: list[str]) -> None:
    if lines:
        console.print(title, style="bold")
        for line in lines:
            console.print(f"  {line}", markup=False, highlight=False)

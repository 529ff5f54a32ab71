"""Rounds of prefill and decode by all systems of one format in turns."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from .. import timing
from ..gpt import GPTConfig
from . import bounds
from .systems import System, Work, helper
from .workers import Failed, Pool, Worker, environment

# A greedy token may part from eager fp32's where two logits nearly tie. The largest gap, in
# standard deviations of the logits, that rounding of the format explains; unrelated models are 4
# apart.
GAPS = {"fp32": 0.25, "bf16": 1.0, "int8": 1.5, "int4": 3.0}
_PACKAGES = ("transformers", "openvino", "nncf", "llama-cpp-python", "gguf", "ctranslate2")


@dataclass(frozen=True)
class Row:
    """One system in one format at one work.

    prefill, token: seconds to the first token of all rows, and per further step; minimum and median
        over the rounds. token is None where a work asks for the prefill only.
    prefill_bound, token_bound: seconds that the measured roofs allow.
    prefill_flops, ...: of one prefill and of one step, for the roofline.
    same, gap: leading greedy tokens equal to eager fp32's in every row, of `compared`; where the
        rows part, the largest gap in standard deviations of the logits.
    others: largest share of all cores that other processes used during a repetition.
    red: what shows that it runs another model, so that it counts in no ratio.
    """

    system: str
    title: str
    format: str
    ours: bool
    work: str
    batch: int
    prompt: int
    new_tokens: int
    rounds: int
    prefill: float
    prefill_median: float
    token: float | None
    token_median: float | None
    prefill_bound: float
    token_bound: float
    prefill_flops: float
    prefill_bytes: float
    token_flops: float
    token_bytes: float
    same: int
    compared: int
    gap: float
    others: float
    red: str | None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all rows together, by the median."""
        return self.token_median and self.batch / self.token_median

    @property
    def total_median(self) -> float | None:
        """Seconds for the prompt and all new tokens."""
        if self.token_median is None:
            return None
        return self.prefill_median + (self.new_tokens - 1) * self.token_median


@dataclass
class Run:
    """What every group of one call shares."""

    name: str
    config: GPTConfig
    folder: Path
    works: list[Work]
    rounds: int
    threads: int
    everything: bool  # every work in every format
    show: Callable[[str], object] = print

    def works_of(self, system: System) -> list[Work]:
        return [
            w
            for w in self.works
            if (system.works is None or w.name in system.works)
            and (self.everything or system.format in w.formats)
        ]

    def prompt(self, work: Work) -> list[list[int]]:
        return helper("weights").prompts(self.config, work.batch, work.prompt)

    def warm(self, worker: Worker) -> None:
        """Page faults, packing, compilation: each work once."""
        for work in self.works_of(worker.system):
            worker.run(self.prompt(work), work.new_tokens, limit=3600)


def helper_process(run: Run, module: str, *arguments: str, timed: bool) -> str:
    """Run a module of bench/peers in a process of its own; what it printed.

    Raises:
        Failed: with its last line.
    """
    command = [sys.executable, "-m", f"peers.{module}", *arguments]
    env = environment(run.threads, timed=timed)
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"code {done.returncode}"]
        raise Failed(f"{module}: {last[0]}")
    return done.stdout


def make_checkpoint(run: Run) -> None:
    """The checkpoint and eager fp32's tokens, where they are not there yet."""
    run.folder.mkdir(parents=True, exist_ok=True)
    works = json.dumps([[w.batch, w.prompt, w.new_tokens] for w in run.works])
    config = json.dumps(asdict(run.config))
    arguments = (config, str(run.folder), str(run.threads), works)
    helper_process(run, "truth", *arguments, timed=False)


def make_ready(run: Run, systems: list[System]) -> dict[str, str]:
    """Convert, compile and run each system once, timing nothing; errors by System.key."""
    failed = {}
    with Pool(run.folder, run.threads, run.warm, timed=False) as pool:
        for system in systems:
            run.show(f"making {system.key} ready")
            try:
                pool.get(system)
            except Failed as error:
                failed[system.key] = str(error)
                run.show(f"{system.key}: {error}")
            pool.close()
    return failed


def group(run: Run, format: str, systems: list[System]) -> dict:
    """All systems of one format, measured in turns.

    Returns:
        the machine, the roofs (best of before and after), rows, errors by System.key, and the
        largest share of a core that waiting workers used.
    """
    import torch

    truth = helper("truth")
    truths = {
        w.name: torch.load(truth.file_of(run.folder, w.batch, w.prompt, w.new_tokens))
        for w in run.works
    }
    taken: dict[tuple[str, str], list[dict]] = {}
    failed: dict[str, str] = {}
    busy = timing.others_busy()
    before = _peaks(run)
    with Pool(run.folder, run.threads, run.warm) as pool:
        for turn in range(run.rounds):
            # The other way round every second time: none always follows the same neighbour, and
            # where memory holds only some workers, half of them are still alive.
            for system in systems[:: 1 if turn % 2 == 0 else -1]:
                if system.key in failed:
                    continue
                try:
                    answers = [
                        (work.name, pool.repetition(system, work, run.prompt(work)))
                        for work in run.works_of(system)
                    ]
                except Failed as error:
                    failed[system.key] = str(error)
                    run.show(f"{system.key}: {error}")
                    continue
                for work, answer in answers:
                    taken.setdefault((system.key, work), []).append(answer)
            run.show(f"{format}: round {turn + 1} of {run.rounds}")
        idle = pool.idle_share
    peaks = _best(before, _peaks(run))
    rows = [
        _row(run, system, work, taken[system.key, work.name], truths[work.name], peaks)
        for system in systems
        for work in run.works_of(system)
        if system.key not in failed
    ]
    machine = timing.machine(
        others_busy_before=busy,
        worker_threads=run.threads,
        versions=_versions(),
    )
    return {
        "machine": machine,
        "peaks": peaks,
        "idle_share": idle,
        "rows": [asdict(row) for row in rows],
        "failed": failed,
    }


def _row(
    run: Run, system: System, work: Work, answers: list[dict], truth: dict, peaks: dict
) -> Row:
    agreed = [helper("truth").agreement(truth, answer["tokens"]) for answer in answers]
    same, gap = min(s for s, _ in agreed), max(g for _, g in agreed)
    red = None
    if gap > GAPS[system.format]:
        red = f"token {same + 1} is {gap:.2f} standard deviations from eager fp32's"
    prefill = [answer["seconds"][0] for answer in answers]
    token = [statistics.fmean(answer["seconds"][1:]) for answer in answers]
    timed = work.new_tokens > 2
    first = bounds.prefill(run.config, work, system.format)
    further = bounds.step(run.config, work, system.format)
    return Row(
        system=system.name,
        title=system.title,
        format=system.format,
        ours=system.ours,
        work=work.name,
        batch=work.batch,
        prompt=work.prompt,
        new_tokens=work.new_tokens,
        rounds=len(answers),
        prefill=min(prefill),
        prefill_median=statistics.median(prefill),
        token=min(token) if timed else None,
        token_median=statistics.median(token) if timed else None,
        prefill_bound=first.seconds(peaks, system.format),
        token_bound=further.seconds(peaks, system.format),
        prefill_flops=first.flops,
        prefill_bytes=first.bytes,
        token_flops=further.flops,
        token_bytes=further.bytes,
        same=same,
        compared=work.new_tokens,
        gap=gap,
        others=max(answer["others"] for answer in answers),
        red=red,
    )


def _peaks(run: Run) -> dict:
    return json.loads(helper_process(run, "peaks", str(run.threads), timed=True))


def _best(a: dict, b: dict) -> dict:
    """The higher roof of two measurements: a disturbance only ever lowers one."""
    flops = {kind: max(a["flops"][kind], b["flops"][kind]) for kind in a["flops"]}
    return {**a, "flops": flops, "bandwidth": max(a["bandwidth"], b["bandwidth"])}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def single_ops(run: Run) -> list[dict]:
    """Rows of single.py, taken in a process of its own."""
    command = [sys.executable, "-m", "cgpt_kernels.bench_e2e.single", str(run.threads)]
    env = environment(run.threads, timed=True)
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"code {done.returncode}"]
        raise Failed(f"single ops: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])

"""What a run tells while it runs: a bar or lines, log.jsonl, TensorBoard scalars."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from .. import timing
from ..gpt import GPTConfig
from . import files


def flops_per_token(config: GPTConfig, context: int) -> int:
    """FLOPs of forward and backward per token: 6 per weight of a product, 6 L C T of attention.

    The head is a product, the look-ups are none. Attention's two products take 4 C T per layer and
    token forward, half of them masked, and twice that backward.
    """
    C = config.n_embd
    weights = config.n_layer * (4 * C * C + 2 * C * config.n_inner) + config.vocab_size * C
    return 6 * weights + 6 * config.n_layer * C * context


class Progress:
    """Rich's bar on `console`, or nothing where it is None; a context manager.

    peak: the processor's FLOP/s in the run's dtype, for the share of the bound; None: not told.
    """

    def __init__(self, console, out: Path, steps: int, first: int, tensorboard: bool):
        self.console, self.out, self.steps = console, out, steps
        self.first = first
        self.bar = self.task = self.writer = None
        self.log = None
        if tensorboard:
            self.writer = _writer(out / "tensorboard", first)

    def __enter__(self) -> Progress:
        _forget(self.out / "log.jsonl", self.first)
        self.log = open(self.out / "log.jsonl", "a", encoding="utf-8")
        if self.console is not None:
            from rich import progress as bars

            columns = [bars.TextColumn("step {task.completed}/{task.total}"), bars.BarColumn()]
            columns += [bars.TextColumn("{task.description}"), bars.TimeRemainingColumn()]
            self.bar = bars.Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("", total=self.steps, completed=self.first)
            self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.writer is not None:
            self.writer.close()
        self.log.close()

    def tell(self, text: str) -> None:
        """A line that stays."""
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def scalars(self, step: int, **values: float) -> None:
        """Log values by name, as they are after `step` steps."""
        self.log.write(json.dumps({"step": step, **values}) + "\n")
        self.log.flush()
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        text = ", ".join(_said(name, value) for name, value in values.items())
        if self.bar is not None and "loss" in values:
            self.bar.update(self.task, description=text)
        if self.console is not None and ("loss" not in values or not self.console.is_terminal):
            self.tell(f"step {step}/{self.steps}: {text}")


def peak_flops(dtype: torch.dtype) -> float:
    """The processor's, measured once in a second."""
    return timing.peak_flops(dtype, torch.get_num_threads())


def check_tensorboard() -> None:
    """ValueError where it is not installed."""
    _summary_writer()


def _said(name: str, value: float) -> str:
    words = name.replace("_", " ")
    if name == "tokens_per_second":
        return f"{value:,.0f} tokens/s"
    if name == "share_of_bound":
        return f"{value:.0%} of the bound"
    if name == "learning_rate":
        return f"lr {value:.2e}"
    return f"{words} {value:.4f}" if math.isfinite(value) else f"{words} {value}"


def _summary_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"train: --tensorboard needs the package tensorboard ({error}): "
            "pip install 'cgpt-kernels[train]'"
        ) from None
    return SummaryWriter


def _writer(folder: Path, first: int):
    # Scalars from beyond the checkpoint, which a killed run has written, are told away.
    return _summary_writer()(str(folder), purge_step=first + 1 if first else None)


def _forget(log: Path, after: int) -> None:
    """Drop what a killed run has logged beyond step `after`, and a line cut short."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= after:
            kept.append(line)
    files.write(log, "".join(kept))

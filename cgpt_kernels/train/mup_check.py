"""Whether a parametrization keeps its promise: coordinates and the best learning rate by width.

Two checks of Tensor Programs V (arXiv 2203.03466), figures 5 and 1, on small models and text that a
Markov chain draws:

- coordinates: after t steps of Adam the size of every layer's output is the same at all widths
  under muP, and grows with the width where one learning rate serves all layers;
- sweep: the learning rate with the lowest loss is the same at all widths under muP.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import timing
from ..gpt import GPT, GPTConfig
from . import files
from .settings import mup_fields

VOCABULARY = 64
PARAMETRIZATIONS = ("standard", "mup")
WIDTHS = (32, 64, 128, 256)
BASE_WIDTH = 32  # the width at which both parametrizations learn alike
RATES = tuple(2.0**-p for p in range(10, 2, -1))
STEPS, BATCH, CONTEXT = 120, 8, 64
_BETAS = (0.9, 0.95)


def model_of(width: int, parametrization: str) -> GPT:
    """Two layers with four heads: a wider model has wider heads, which muP's 1/D is about."""
    config = GPTConfig(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=width, n_layer=2, n_head=4
    )
    if parametrization == "mup":
        config = dataclasses.replace(config, **mup_fields(width, BASE_WIDTH))
    torch.manual_seed(0)
    return GPT(config)


class Text:
    """Tokens of a Markov chain of order two: there is something to learn, and always more of it."""

    def __init__(self, seed: int = 0):
        random = np.random.default_rng(seed)
        self.likely = random.integers(0, VOCABULARY, (VOCABULARY, 4, 4))

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [BATCH, CONTEXT], of step `index`."""
        random = np.random.default_rng([index, 1])
        rows = np.empty((BATCH, CONTEXT + 1), dtype=np.int64)
        rows[:, :2] = random.integers(0, VOCABULARY, (BATCH, 2))
        # the likeliest of four followers comes half of the time, the next a quarter, ...
        drawn = np.minimum(random.geometric(0.5, rows.shape) - 1, 3)
        for t in range(2, CONTEXT + 1):
            rows[:, t] = self.likely[rows[:, t - 1], rows[:, t - 2] % 4, drawn[:, t]]
        rows = torch.from_numpy(rows)
        return rows[:, :-1], rows[:, 1:]


def coordinates(width: int, parametrization: str, rate: float, steps: int) -> list[dict]:
    """Mean |output| of the parts of a model, before each of `steps` steps and after the last.

    "embedding", "attention" and "mlp" (of the last layer), "residual" (the last sum), "logits".
    """
    model, text, sizes = model_of(width, parametrization), Text(), []
    block = model.transformer["h"][-1]
    now: dict[str, float] = {}

    def size(name: str) -> Callable:
        return lambda module, inputs, output: now.update({name: output.abs().mean().item()})

    for name, module in (
        ("embedding", model.transformer["wte"]),
        ("attention", block.attn),
        ("mlp", block.mlp),
        ("residual", block),
        ("logits", model.lm_head),
    ):
        module.register_forward_hook(size(name))
    optimizer = torch.optim.AdamW(model.optimizer_groups(rate, 0.0), betas=_BETAS, fused=True)
    inputs, targets = text.batch(0)  # the same ones: what a step does to them is what is measured
    for step in range(steps + 1):
        loss = model(inputs, targets=targets)
        sizes.append(dict(now))
        if step < steps:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return sizes


def growth(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """Exponent e of sizes ~ width ** e, by least squares."""
    return statistics.linear_regression(
        [math.log(w) for w in widths], [*map(math.log, sizes)]
    ).slope


def final_loss(width: int, parametrization: str, rate: float, steps: int) -> float:
    """Mean loss of the last fifth of a run with linear warm-up and decay; inf where it diverges."""
    model, text, losses = model_of(width, parametrization), Text(), []
    optimizer = torch.optim.AdamW(model.optimizer_groups(rate, 0.0), betas=_BETAS, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        factor = min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        inputs, targets = text.batch(step)
        loss = model(inputs, targets=targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last = statistics.mean(losses[-(steps // 5) :])
    return last if math.isfinite(last) else math.inf


def best_rate(losses: dict[float, float]) -> float:
    """Where the parabola through the lowest loss and its neighbours, over log rate, is lowest.

    losses: loss by learning rate. At an end of the sweep it is that end.
    """
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if at in (0, len(rates) - 1):
        return rates[at]
    left, middle, right = (losses[rates[i]] for i in (at - 1, at, at + 1))
    bend = left - 2 * middle + right
    shift = 0.5 * (left - right) / bend if math.isfinite(bend) and bend > 0 else 0.0
    return rates[at] * (rates[at + 1] / rates[at]) ** shift


def sweep(
    widths: Sequence[int] = WIDTHS,
    steps: int = STEPS,
    told: Callable[[str], object] = lambda text: None,
) -> dict:
    """Losses by parametrization, width and rate, and the best rates: what `mup-check` writes."""
    found = {"steps": steps, "tokens_per_step": BATCH * CONTEXT, "losses": {}, "best": {}}
    found["moves"] = {}
    for parametrization in PARAMETRIZATIONS:
        losses = found["losses"][parametrization] = {}
        best = found["best"][parametrization] = {}
        for width in widths:
            by_rate = {r: final_loss(width, parametrization, r, steps) for r in RATES}
            losses[width], best[width] = by_rate, best_rate(by_rate)
            told(f"{parametrization}, width {width}: best learning rate {best[width]:.2e}")
        exponent = found["moves"][parametrization] = growth(widths, [*best.values()])
        told(f"{parametrization}: the best learning rate goes as width ** {exponent:.2f}")
    return found


def coordinate_check(widths: Sequence[int] = WIDTHS, rate: float = 2.0**-7, steps: int = 5) -> dict:
    """Sizes after `steps` steps by parametrization, width and part, and their growth by part."""
    found: dict = {"steps": steps, "rate": rate, "sizes": {}, "growth": {}}
    for parametrization in PARAMETRIZATIONS:
        sizes = {w: coordinates(w, parametrization, rate, steps)[-1] for w in widths}
        found["sizes"][parametrization] = sizes
        found["growth"][parametrization] = {
            part: growth(widths, [sizes[w][part] for w in widths]) for part in sizes[widths[0]]
        }
    return found


def check_matplotlib() -> None:
    """ValueError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "mup-check: the plot needs the package matplotlib: pip install 'cgpt-kernels[train]'"
        )


def write(found: dict, out: Path) -> None:
    """OUT.json and OUT.png."""
    machine = {n: v for n, v in timing.machine().items() if n in ("cpu", "torch", "commit")}
    files.write(
        out.with_suffix(".json"), json.dumps({"machine": machine, **found}, indent=1) + "\n"
    )
    plot(found, out.with_suffix(".png"))


def plot(found: dict, file: Path) -> None:
    """Loss over learning rate, and size over width, each by parametrization."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.2))
    names = {"standard": "standard parametrization", "mup": "muP"}
    for column, parametrization in enumerate(PARAMETRIZATIONS):
        losses, panel = found["losses"][parametrization], axes[0, column]
        colours = pyplot.cm.viridis(np.linspace(0, 0.85, len(losses)))
        for colour, (width, by_rate) in zip(colours, losses.items(), strict=True):
            panel.plot([*by_rate], [*by_rate.values()], "o-", color=colour, label=f"width {width}")
            panel.axvline(found["best"][parametrization][width], color=colour, ls=":")
        panel.set_xscale("log", base=2)
        panel.set(xlabel="peak learning rate", ylabel="loss, nats per token")
        moves = found["moves"][parametrization]
        panel.set_title(f"{names[parametrization]}: best rate goes as width$^{{{moves:.2f}}}$")
        panel.legend(frameon=False)
        sizes, panel = found["coordinates"]["sizes"][parametrization], axes[1, column]
        for part, exponent in found["coordinates"]["growth"][parametrization].items():
            values = [of[part] for of in sizes.values()]
            panel.plot([*sizes], values, "o-", label=f"{part}, width$^{{{exponent:.2f}}}$")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set(xlabel="width", ylabel=f"mean size after {found['coordinates']['steps']} steps")
        panel.legend(frameon=False)
    shared = [y for of in found["losses"].values() for by in of.values() for y in by.values()]
    low, high = min(shared), sorted(shared)[len(shared) * 9 // 10]
    for panel in axes[0]:
        panel.set_ylim(low - 0.05, high + 0.1)
    for side in (0, 1):
        axes[1, side].sharey(axes[1, 0])
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)

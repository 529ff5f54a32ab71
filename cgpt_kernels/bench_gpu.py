"""The targets of a GPU, each measured and said to be met or short: the end of
`cgpt-kernels bench --device cuda`.

Shapes fill an H100, for which the targets are set. Times are medians of interleaved runs; against
means the fastest of the named ones that are installed and take the case.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import bench, timing
from .gpt import GPT, GPTConfig
from .ops.attention.cases import AttentionCase
from .ops.cross_entropy.cases import LinearCrossEntropyCase
from .ops.gemm.cases import GemmCase
from .ops.layer_norm.cases import AddLayerNormCase, LayerNormCase
from .replace import replace

BF16 = torch.bfloat16
FUSED = ("flash", "cudnn", "flash_attn")
NORMS = ("eager", "compile", "liger")
WIDTHS = (768, 1088, 1536, 2048, 2560, 4096, 5120)


@dataclass(frozen=True)
class Target:
    """One line: times in microseconds by system, "ours" among them."""

    name: str
    target: float  # at least this many times as fast as the fastest of `against`
    against: tuple[str, ...]
    us: dict[str, float]
    red: str | None = None  # what broke the numerics rule
    memory: float | None = None  # peak, as a share of eager's
    memory_target: float | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Against the fastest; NaN on a red case, and where none of the others is there."""
        others = [self.us[name] for name in self.against if name in self.us]
        return math.nan if self.red or not others else min(others) / self.us["ours"]

    @property
    def met(self) -> bool:
        small = self.memory_target is None or self.memory <= self.memory_target
        return self.ratio >= self.target and small


def _times(row: bench.Row) -> dict[str, float]:
    times = {"ours": row.us_median, "eager": row.eager_us_median, **row.peers_us_median}
    return times | ({"compile": row.compile_us_median} if row.compile_us_median else {})


def _attention(S: int, measure) -> Iterable[Target]:
    case = AttentionCase(
        name=f"{S}", why="", B=max(1, 16384 // S), H=12, Sq=S, Sk=S, D=64, layout="packed"
    )
    forward = measure(case, BF16)
    both = measure(case, BF16, gradients=True)
    first, whole = _times(forward), _times(both)
    more = {"against": FUSED, "missing": bench.missing_peers()}
    yield Target(f"attention forward {S}", 1 / 1.10, us=first, red=forward.red, **more)
    # gradients alone: what the forward takes is known
    backward = {name: whole[name] - first[name] for name in whole if name in first}
    yield Target(f"attention backward {S}", 1 / 1.15, us=backward, red=both.red, **more)


def _norm(cls, C: int, target: float, against, gradients: bool, measure) -> Target:
    case = cls(name=f"{C}", why="", rows=(8, 1024), C=C)
    row = measure(case, BF16, gradients=gradients)
    name = f"{case.op} {'forward + backward' if gradients else 'forward'} {C}"
    more = {"missing": bench.missing_peers(), "red": row.red}
    return Target(name, target, against, _times(row), **more)


def _gemm(measure) -> Target:
    case = GemmCase(
        name="fc", why="", M=8192, N=3072, K=768, layout="kn", bias=True, activation="gelu"
    )
    row = measure(case, BF16)
    return Target("gemm + bias + gelu", 1.15, ("eager",), _times(row), row.red)


def _loss(measure) -> Target:
    case = LinearCrossEntropyCase(name="head", why="", M=4096, K=768, V=50257)
    row = measure(case, BF16, gradients=True)
    peaks = row.peak_bytes
    share = peaks["ours"] / peaks["eager"] if peaks.get("eager") else math.inf
    more = {"memory": share, "memory_target": 1 / 8, "missing": bench.missing_peers()}
    name = "linear_cross_entropy forward + backward"
    return Target(name, 1 / 1.1, ("eager",), _times(row), row.red, **more)


def step(
    config: GPTConfig,
    *,
    batch: int = 8,
    tokens: int = 1024,
    device: str = "cuda",
    backend: str = "auto",
    **timed,
) -> Target:
    """A training step with AdamW of the reference GPT in bf16: replaced, eager, torch.compile."""
    torch.manual_seed(0)
    eager = GPT(config).to(device, BF16).train()
    models = {"ours": copy.deepcopy(eager), "eager": eager, "compile": copy.deepcopy(eager)}
    replace(models["ours"], backend=backend)
    models["compile"] = torch.compile(models["compile"])
    drawn = torch.randint(config.vocab_size, (batch, tokens + 1), device=device)

    def training(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def run():
            optimizer.zero_grad()
            loss = model(drawn[:, :-1], targets=drawn[:, 1:])
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run

    steps = {name: training(model) for name, model in models.items()}
    losses = {name: run().item() for name, run in steps.items()}  # before the first update
    differs = abs(losses["ours"] - losses["eager"]) > 2e-2 * abs(losses["eager"])
    taken = timing.interleave(steps, **timed)
    us = {name: t.median * 1e6 for name, t in taken.items()}
    red = f"loss {losses['ours']:.4f}, eager's {losses['eager']:.4f}" if differs else None
    return Target(f"training step {config.n_layer} x {config.n_embd}", 1.3, ("compile",), us, red)


def targets(measure: Callable, train: Callable[[], Target]) -> Iterable[Target]:
    """Every target, measured one after the other.

    Args:
        measure: (case, dtype, gradients=False) -> bench.Row, on the GPU.   train: see step().
    """
    for S in (1024, 2048, 4096):
        yield from _attention(S, measure)
    for C in WIDTHS:
        for gradients in (False, True):
            yield _norm(LayerNormCase, C, 1.0, NORMS, gradients, measure)
    for C in (768, 2048):
        yield _norm(AddLayerNormCase, C, 1.5, ("eager",), False, measure)
    yield _gemm(measure)
    yield _loss(measure)
    yield train()


HEADER = f"{'target':<42}{'ours us':>10}{'best other':>22}{'ratio':>8}{'asked':>8}  met"


def line(made: Target) -> str:
    """The target as text under HEADER."""
    others = {name: made.us[name] for name in made.against if name in made.us}
    best = min(others, key=others.get) if others else None
    other = f"{best} {others[best]:.1f}" if best else "none of them is here"
    ratio = "red" if made.red else f"{made.ratio:.2f}x"
    text = f"{made.name:<42}{made.us['ours']:>10.1f}{other:>22}{ratio:>8}{made.target:>7.2f}x"
    text += "  yes" if made.met else "  short"
    if made.memory is not None:
        text += f"\n  peak memory {made.memory:.3f} of eager's, asked {made.memory_target:.3f}"
    return text


def run(
    *,
    backend: str = "auto",
    show: Callable[[str], object] = print,
    out: Path | None = None,
    measure: Callable | None = None,
    train: Callable[[], Target] | None = None,
) -> list[Target]:
    """Measure every target, show each as it comes, write JSON beside the ops'."""

    def on_gpu(case, dtype, gradients=False):
        options = {"device": "cuda", "backend": backend, "gradients": gradients}
        return bench.measure(case, dtype, **options)

    def train_111m():
        config = GPTConfig.from_name("cerebras-gpt-111m")
        return step(config, backend=backend, seconds=20.0, wait=torch.cuda.synchronize)

    made = []
    show(HEADER)
    for one in targets(measure or on_gpu, train or train_111m):
        made.append(one)
        show(line(one))
        if one.red:
            show(f"  numerics: {one.red}")
    for name, reason in bench.missing_peers().items():
        show(f"without {name}: {reason}")
    short = sum(not one.met for one in made)
    show(f"{len(made) - short} of {len(made)} targets met")
    if out is None and bench.RESULTS.parent.is_dir() and torch.cuda.is_available():
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
        out = bench.RESULTS / name / "targets.json"
    if out:
        rows = [asdict(one) | {"ratio": one.ratio, "met": one.met} for one in made]
        show(f"written to {timing.write(Path(out), rows)}")
    return made

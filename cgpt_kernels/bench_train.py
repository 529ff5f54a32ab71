"""`cgpt-kernels bench train`: training steps and their ops against eager and torch.compile.

Every row times its systems in turns, in one run. A row whose loss or gradients are not eager's is
red and gets no ratio; under dropout, whose masks differ, only the loss is compared, loosely.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, checks, timing
from .gpt import GPT, GPTConfig
from .ops import registry
from .replace import replace

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
DROPOUT = 0.1
# AdamW reads gradient, weight and both moments and writes all but the gradient, in fp32; the bf16
# gradient is read and written wide before it, the bf16 weight written after it.
ADAMW_BYTES = 7 * 4 + (2 + 4) + (4 + 2)


@dataclass(frozen=True)
class Row:
    """One line of the table. Times are milliseconds: minimum and median of each system."""

    name: str
    shape: str
    dtype: str
    threads: int
    target: float  # at least this many times as fast as the better of the others
    ms: dict[str, float]
    ms_median: dict[str, float]
    bound_ms: float
    limit: str
    red: str | None = None  # what differs from eager
    missing: dict[str, str] = field(default_factory=dict)  # systems that could not run, and why
    peak_mb: dict[str, float] = field(default_factory=dict)  # memory beyond inputs and gradients
    memory_target: float | None = None  # at most this share of eager's peak

    @property
    def ratio(self) -> float:
        """Against the best other system, by medians; NaN on a red row."""
        others = [t for name, t in self.ms_median.items() if name != "ours"]
        return math.nan if self.red else min(others) / self.ms_median["ours"]

    @property
    def share(self) -> float:
        """Share of the bound reached."""
        return self.bound_ms / self.ms["ours"]

    @property
    def memory(self) -> float | None:
        """Peak memory as a share of eager's; None where it is not asked or cannot be read."""
        if self.memory_target is None or not self.peak_mb.get("eager"):
            return None
        return self.peak_mb["ours"] / self.peak_mb["eager"]

    @property
    def met(self) -> bool:
        memory_met = self.memory is None or self.memory <= self.memory_target
        return self.ratio >= self.target and memory_met


# ---- whole models -------------------------------------------------------------------------------


def _batch(config: GPTConfig, tokens: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(config.vocab_size, (1, tokens + 1), generator=_generator())
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _pair(config: GPTConfig, dtype: torch.dtype) -> tuple[GPT, GPT]:
    """The same model twice, replaced and plain, in training mode."""
    torch.manual_seed(0)
    eager = GPT(config).to(dtype).train()
    ours = copy.deepcopy(eager)
    replace(ours)
    return ours, eager


def _step(model: Callable, parameters: list[nn.Parameter], batch) -> Callable[[], Tensor]:
    """Forward and backward into fresh gradients, as after optimizer.zero_grad()."""

    def run():
        for p in parameters:
            p.grad = None
        loss = model(batch[0], targets=batch[1])
        loss.backward()
        return loss.detach()

    return run


class _MasterAdamW:
    """AdamW on fp32 copies of bf16 parameters, as mixed-precision training has it. One set of
    copies and moments serves all systems, which would otherwise need 16 bytes a parameter each."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.wide = [p.detach().float() for p in parameters]
        for w in self.wide:
            w.grad = torch.zeros_like(w)
        options = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
        self.optimizer = torch.optim.AdamW(self.wide, **options)

    def after(self, step: Callable, parameters: list[nn.Parameter]) -> Callable[[], None]:
        """step, then the optimizer on the gradients it left on `parameters`."""

        @torch.no_grad()
        def update():
            torch._foreach_copy_([w.grad for w in self.wide], [p.grad for p in parameters])
            self.optimizer.step()
            torch._foreach_copy_(parameters, self.wide)

        def run():
            step()
            update()

        return run


def _differs(
    ours: GPT, eager: GPT, losses: dict[str, Tensor], dtype, dropout: bool, batch
) -> str | None:
    """What of loss and gradients is not eager's; None where all is. In 16 bits, a gradient that is
    nearer to fp32's than eager's counts as the same: eager's sums over 1024 tokens are 20 % off."""
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    a, b = losses["ours"].item(), losses["eager"].item()
    if not abs(a - b) <= (0.2 if dropout else tolerance) * abs(b):
        return f"loss {a:.6f}, eager's {b:.6f}"
    if dropout:
        return None
    truth = None
    for (name, p), q in zip(ours.named_parameters(), eager.parameters(), strict=True):
        off = (p.grad.float() - q.grad.float()).norm() / q.grad.float().norm()
        if off <= (3e-3 if dtype == torch.float32 else 0.1):
            continue
        if dtype != torch.float32:
            if truth is None:
                wide = copy.deepcopy(eager).float()
                wide.zero_grad()
                wide(batch[0], targets=batch[1]).backward()
                truth = {n: r.grad for n, r in wide.named_parameters()}
            errors = [(g.grad.float() - truth[name]).norm() for g in (p, q)]
            if errors[0] <= errors[1]:
                continue
        return f"the gradient of {name} is {off:.2%} away from eager's"
    return None


def _model_flops(config: GPTConfig, tokens: int) -> int:
    """Of forward and backward: the backward is two products for each of the forward's."""
    C = config.n_embd
    projections = config.n_layer * (4 * C * C + 2 * C * config.n_inner) + C * config.vocab_size
    attention = config.n_layer * 2 * C * tokens * (tokens + 1) // 2  # q k^T and p v, causal
    return 3 * 2 * (tokens * projections + attention)


def model_row(
    name: str,
    target: float,
    config: GPTConfig,
    tokens: int,
    dtype: torch.dtype,
    *,
    dropout: bool = False,
    adamw: bool = False,
    compile: bool = True,
    seconds: float = 20.0,
    rounds: int = 5,
    show: Callable[[str], object] = print,
) -> Row:
    """A step of the reference GPT on `tokens` tokens, batch 1: replaced, eager, torch.compile."""
    if dropout:
        rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), DROPOUT)
        config = dataclasses.replace(config, **rates)
    ours, eager = _pair(config, dtype)
    batch, missing = _batch(config, tokens), {}
    steps = {
        "ours": _step(ours, list(ours.parameters()), batch),
        "eager": _step(eager, list(eager.parameters()), batch),
    }
    losses = {system: step() for system, step in steps.items()}
    red = _differs(ours, eager, losses, dtype, dropout, batch)
    if compile:
        reason = no_compiler()
        if reason is not None:
            missing["compile"] = reason
        else:
            show(f"  torch.compile builds {name}: a minute or two, once")
            torch._dynamo.reset()
            compiled = torch.compile(eager, dynamic=False)
            steps["compile"] = _step(compiled, list(eager.parameters()), batch)
            steps["compile"]()
    if adamw:
        optimizer = _MasterAdamW(list(eager.parameters()))
        steps = {
            system: optimizer.after(step, list((ours if system == "ours" else eager).parameters()))
            for system, step in steps.items()
        }
    taken = timing.interleave(steps, seconds=seconds, rounds=rounds)
    threads = torch.get_num_threads()
    limit = timing.bound(_model_flops(config, tokens), 0, dtype, threads).seconds
    if adamw:
        nbytes = ADAMW_BYTES * sum(p.numel() for p in ours.parameters())
        limit += nbytes / timing.bandwidth(nbytes, threads)
    shape = f"B1 T{tokens}, {config.n_layer} x {config.n_embd}"
    return _row(name, shape, dtype, target, taken, limit, "compute", red, missing)


def _row(name, shape, dtype, target, taken, seconds, limit, red, missing=None, **more) -> Row:
    return Row(
        name=name,
        shape=shape,
        dtype=checks.name_of(dtype),
        threads=torch.get_num_threads(),
        target=target,
        ms={system: t.minimum * 1e3 for system, t in taken.items()},
        ms_median={system: t.median * 1e3 for system, t in taken.items()},
        bound_ms=seconds * 1e3,
        limit=limit,
        red=red,
        missing=missing or {},
        **more,
    )


def no_compiler() -> str | None:
    """Why torch.compile cannot run here; None where a C++ compiler is there."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        return f"no C++ compiler ({first}): install g++, or set CXX"
    return None


# ---- single ops ---------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Bytes of memory a call adds to the process at its peak; None where /proc does not tell."""

    def resident(what):
        found = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(found[1])

    try:
        # What the allocator kept of earlier calls would be used again, and not be seen.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = resident("VmRSS")
        kept = call()
        high = resident("VmHWM")
    except (OSError, TypeError, AttributeError):  # another system, or another C library
        return None
    del kept
    return max(high - before, 0)


def op_row(
    name: str,
    target: float,
    case,
    dtype: torch.dtype,
    *,
    eager: Callable[[dict], Callable] | None = None,
    check=None,
    memory_target: float | None = None,
    seconds: float = 5.0,
    rounds: int = 7,
) -> Row:
    """Forward and backward of one op's case beside torch's own way of writing it.

    Args:
        eager: inputs -> torch's call; None for the case's own.
        check: a smaller case to hold to the numerics rule, where this one takes gigabytes in fp64.
        memory_target: also compare peak memory beyond inputs and gradients.
    """
    from .testing import differentiable, hold_to_rule

    function, red = registry.FUNCTIONS[case.op], None
    try:
        hold_to_rule(function, (check or case).inputs(dtype), gradients=True)
    except AssertionError as error:
        red = str(error)
    inputs = case.inputs(dtype)
    given = {key: value for key, value in inputs.items() if value is not None}
    leaves = [inputs[key].requires_grad_() for key in differentiable(inputs)]

    def both(call):
        def run():
            out = call()
            return torch.autograd.grad(out, leaves, torch.ones_like(out))

        return run

    torch_call = (eager or case.torch_call)(inputs)
    steps = {"ours": both(lambda: function(**given)), "eager": both(torch_call)}
    taken = timing.interleave(steps, seconds=seconds, rounds=rounds)
    peaks = {}
    if memory_target is not None:
        kept = sum(leaf.nbytes for leaf in leaves)  # the gradients, which both leave behind
        found = {system: peak_bytes(step) for system, step in steps.items()}
        # Eager's peak is reached before the gradient of the weight is there.
        peaks = {
            system: (peak - (kept if system == "ours" else 0)) / 1e6
            for system, peak in found.items()
            if peak is not None
        }
    flops, nbytes = 3 * case.flops, 2 * case.bytes(dtype)
    limit = timing.bound(flops, nbytes, dtype, torch.get_num_threads())
    return _row(
        name,
        case.shape,
        dtype,
        target,
        taken,
        limit.seconds,
        limit.limit,
        red,
        peak_mb=peaks,
        memory_target=memory_target,
    )


def _case(op: str, name: str):
    return next(case for case in registry.cases("bench", op) if case.name == name)


def _plain_loss(inputs: dict) -> Callable[[], Tensor]:
    """The loss on logits as they are, without transformers' cast of all of them to fp32."""
    x, weight, target = inputs["x"], inputs["weight"], inputs["target"]
    return lambda: F.cross_entropy(F.linear(x, weight), target)


# ---- the table ----------------------------------------------------------------------------------

BF16, FP32 = torch.bfloat16, torch.float32


def _model_rows(config: GPTConfig, tokens: int, **options) -> dict[str, Callable[[], Row]]:
    def row(name, target, dtype, **more):
        return lambda: model_row(name, target, config, tokens, dtype, **options, **more)

    return {
        "bf16": row("forward + backward", 2.0, BF16),
        "dropout": row(f"with dropout {DROPOUT}", 2.5, BF16, dropout=True),
        "fp32": row("forward + backward", 1.25, FP32),
        "adamw": row("step, AdamW on fp32", 2.0, BF16, adamw=True),
    }


def _op_rows(config: GPTConfig, tokens: int, **options) -> dict[str, Callable[[], list[Row]]]:
    heads, width = {"H": config.n_head, "D": config.head_dim}, config.n_embd
    attention = dataclasses.replace(_case("attention", "111m_2048"), layout="bhsd", **heads)
    head = dataclasses.replace(
        _case("linear_cross_entropy", "111m_512"), M=tokens, K=width, V=config.vocab_size
    )
    norm = dataclasses.replace(_case("layer_norm", "111m_512"), rows=(1, tokens), C=width)

    def loss():
        # 130 rows: still several groups of rows at GPT-2's vocabulary.
        given = {"check": dataclasses.replace(head, M=130), "memory_target": 1 / 8, **options}
        return [
            op_row("linear_cross_entropy", 1.5, head, BF16, **given),
            op_row("  eager's logits bf16", 1.5, head, BF16, eager=_plain_loss, **given),
            op_row("linear_cross_entropy", 1.5, head, FP32, **given),
        ]

    small = dataclasses.replace(attention, Sq=256, Sk=256)
    return {
        "attention": lambda: [op_row("attention", 2.0, attention, BF16, check=small, **options)],
        "linear_cross_entropy": loss,
        "layer_norm": lambda: [op_row("layer_norm", 1.5, norm, d, **options) for d in (BF16, FP32)],
    }


ROWS = ("bf16", "dropout", "fp32", "adamw", "attention", "linear_cross_entropy", "layer_norm")
HEADER = (
    f"{'work':<23}{'shape':<27}{'dtype':<9}{'ours':>9}{'eager':>9}{'compile':>9}{'ratio':>7}"
    f"{'target':>7}{'bound':>9}{'share':>7}  met"
)


def line(row: Row) -> str:
    """The row as text under HEADER: medians in milliseconds, the share by the minimum."""

    def ms(value):
        if value is None:
            return f"{'-':>9}"
        return f"{value:>9.1f}" if value >= 10 else f"{value:>9.3f}"

    times = "".join(ms(row.ms_median.get(system)) for system in ("ours", "eager", "compile"))
    ratio = "red" if row.red else f"{row.ratio:.2f}x"
    text = (
        f"{row.name:<23}{row.shape[:26]:<27}{row.dtype:<9}{times}{ratio:>7}{row.target:>6g}x"
        f"{ms(row.bound_ms)}{row.share:>6.0%}   {'yes' if row.met else 'no'}"
    )
    if row.memory is not None:
        ours, eager = row.peak_mb["ours"], row.peak_mb["eager"]
        text += (
            f"\n  peak memory beyond inputs and gradients: {ours:.0f} MB, eager's {eager:.0f} MB: "
            f"{row.memory:.3f}, target at most {row.memory_target:g}"
        )
    return text


def run(
    *,
    model: str = "cerebras-gpt-111m",
    tokens: Iterable[int] = (512,),
    only: Iterable[str] | None = None,
    threads: int | None = None,
    compile: bool = True,
    seconds: float = 20.0,
    rounds: int = 5,
    out: str | Path | None = None,
    show: Callable[[str], object] = print,
) -> list[Row]:
    """Measure, show a line for each row as it comes, write JSON.

    Args:
        model: of GPTConfig.from_name.
        tokens: in one sequence; a table for each.
        only: names among ROWS; None for all.
        threads: None for torch's own number.
        compile: also time torch.compile, which first builds for a minute or two per row.
        seconds: measuring time of a model's row, a quarter of it for an op's.
        rounds: samples of each system at least.
        out: JSON file; None for bench/results/<machine>/train-<model>.json in a checkout; "" for
            none.
        show: called with each line of text.
    Raises:
        ValueError: unknown model or row, or more tokens than the model has positions.
    """
    config = GPTConfig.from_name(model)
    tokens = tuple(tokens)
    if not tokens or min(tokens) < 1 or max(tokens) > config.n_positions:
        raise ValueError(
            f"bench train: tokens must be in [1, {config.n_positions}] for {model}, got {tokens}"
        )
    if backends._C is None:
        raise ValueError(f"bench train: {backends._C_REASON}")
    only = ROWS if only is None else tuple(only)
    for name in only:
        checks.is_choice("bench train", "row", name, ROWS)
    rows = []
    with timing.threads(threads) as count:
        busy = timing.others_busy()
        show(f"{timing.machine_cpu()}, {count} threads, torch {torch.__version__}; milliseconds")
        if busy is not None and busy > timing.BUSY:
            show(f"other processes use {busy:.0%} of the cores: trust ratios at most")
        if compile and no_compiler() is not None:
            show(f"without torch.compile: {no_compiler()}")
        show(HEADER)
        for T in tokens:
            options = {"seconds": seconds, "rounds": rounds}
            models = _model_rows(config, T, compile=compile, show=show, **options)
            ops = _op_rows(config, T, **{**options, "seconds": seconds / 4})
            for name in only:
                made = [models[name]()] if name in models else ops[name]()
                for row in made:
                    rows.append(row)
                    show(line(row))
                    if row.red:
                        show(f"  {row.red}")
        met = sum(row.met for row in rows)
        show(f"{met} of {len(rows)} targets met")
        if out is None:
            folder = RESULTS / timing.machine_name()
            out = folder / f"train-{model}.json" if RESULTS.parent.is_dir() else ""
        if out:
            written = [_as_json(row) for row in rows]
            path = timing.write(Path(out), written, others_busy_before=busy)
            show(f"written to {path}")
    return rows


def _as_json(row: Row) -> dict:
    derived = {"ratio": None if row.red else row.ratio, "share": row.share, "met": row.met}
    return asdict(row) | derived | {"memory": row.memory}

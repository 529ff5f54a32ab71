"""Benchmarks of the ops: time, bound and share of the bound, beside eager and torch.compile.

A case is checked against the numerics rule first; where that fails no speed-up is given. On a GPU
cases are also timed beside each of torch's own fused attentions and other libraries that take them,
and what the kernels for Hopper take with those switched on.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import backends, checks, timing
from .ops import registry
from .ops.case import BENCH, Case
from .testing import differentiable, hold_to_rule

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


@dataclass(frozen=True)
class Row:
    """One case in one dtype. Times are microseconds per call: minimum, median."""

    op: str
    case: str
    shape: str
    dtype: str
    threads: int
    backend: str
    us: float
    us_median: float
    eager_us: float
    eager_us_median: float
    compile_us: float | None
    compile_us_median: float | None
    bound_us: float
    limit: str
    red: str | None  # what broke the numerics rule
    device: str = "cpu"
    gradients: bool = False  # forward and backward
    peers_us: dict[str, float] = field(default_factory=dict)  # minima of other libraries
    peers_us_median: dict[str, float] = field(default_factory=dict)
    hopper_us: float | None = None  # ours with the kernels for Hopper, minimum
    peak_bytes: dict[str, int] = field(default_factory=dict)  # on a GPU: of one call, beyond inputs

    @property
    def share(self) -> float:
        """Share of the bound reached; beyond 1 where caches beat the measured bandwidth."""
        return self.bound_us / self.us

    @property
    def speedup(self) -> float:
        """Against the fastest of eager, torch.compile and peers, by minima; NaN on a red case."""
        if self.red:
            return math.nan
        return min(self.eager_us, self.compile_us or math.inf, *self.peers_us.values()) / self.us


def _compiled(case: Case, inputs: dict) -> Callable:
    torch._dynamo.reset()
    return case.torch_call(inputs, wrap=torch.compile)


# torch's fused attention on a GPU; the default picks among them by its own rules.
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


# Other libraries on a GPU: the module that a package brings.
PACKAGES = {"liger": ("liger_kernel", "liger-kernel"), "flash_attn": ("flash_attn", "flash-attn")}


def missing_peers() -> dict[str, str]:
    """Other libraries that are not installed, and how to get them."""
    return {
        name: f"pip install {package}"
        for name, (module, package) in PACKAGES.items()
        if importlib.util.find_spec(module) is None
    }


def _peers(case: Case, inputs: dict) -> dict[str, Callable]:
    """What else takes the case on a GPU: each implementation of SDPA alone, other libraries."""
    first = next(iter(inputs.values()))
    if first.device.type != "cuda":
        return {}
    wanted = {}
    if case.op == "attention":
        call = case.torch_call(inputs)
        for name, which in SDPA.items():

            def only(which=which):
                with sdpa_kernel(which):
                    return call()

            wanted[name] = only
    missing = missing_peers()
    wanted |= {n: c for n, c in _libraries(case, inputs).items() if n not in missing}
    found = {}
    for name, call in wanted.items():
        try:
            call()
        except RuntimeError:  # says which inputs it does not take
            continue
        found[name] = call
    return found


def _libraries(case: Case, inputs: dict) -> dict[str, Callable]:
    """Calls of libraries that need not be there for what the case asks, and nothing beyond."""
    i = inputs
    if case.op == "attention":
        plain = {"q", "k", "v", "causal", "scale"}
        if any(value is not None for name, value in i.items() if name not in plain):
            return {}

        def flash_attn():
            from flash_attn import flash_attn_func

            q, k, v = (i[name].transpose(1, 2) for name in "qkv")
            out = flash_attn_func(q, k, v, softmax_scale=i["scale"], causal=i["causal"])
            return out.transpose(1, 2)

        return {"flash_attn": flash_attn}
    if case.op == "layer_norm" and i.get("bias") is not None:

        def norm():
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            return LigerLayerNormFunction.apply(i["x"], i["weight"], i["bias"], 1e-5)

        return {"liger": norm}
    if case.op == "linear_cross_entropy":

        def loss():
            from liger_kernel.transformers.fused_linear_cross_entropy import (
                LigerFusedLinearCrossEntropyLoss,
            )

            names = ("ignore_index", "label_smoothing", "reduction")
            made = LigerFusedLinearCrossEntropyLoss(**{n: i[n] for n in names if n in i})
            rows = i["x"].reshape(-1, i["x"].shape[-1])
            return made(i["weight"], rows, i["target"].reshape(-1), i.get("bias"))

        return {"liger": loss}
    return {}


def _on_hopper(call: Callable) -> Callable | None:
    """call with the kernels for Hopper (csrc/cuda/hopper.h) switched on, or None: they leave it."""
    kernels = backends.cuda_kernels()
    if not getattr(kernels, "hopper_kernels", ()):
        return None

    def switched():
        before = kernels.use_hopper(True)
        try:
            return call()
        finally:
            kernels.use_hopper(before)

    launches = kernels.hopper_launches()
    switched()
    return switched if kernels.hopper_launches() > launches else None


def _written_out(function: Callable, given: dict) -> Callable:
    """function(**given) with its keywords in the code, as a user writes it and as eager's call is:
    a dict of them takes 0.25 us to unpack, a tenth of the smallest call."""
    keywords = ", ".join(f"{name}={name}" for name in given)
    return eval(f"lambda: function({keywords})", {"function": function, **given})


def _with_gradients(call: Callable, inputs: dict) -> Callable:
    """call and the gradients of every differentiable input."""
    leaves = [inputs[name].requires_grad_() for name in differentiable(inputs)]

    def both():
        outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        directions = [torch.ones_like(out) for out in outputs]
        return torch.autograd.grad(outputs, leaves, directions, allow_unused=True)

    return both


def _peak(call: Callable) -> int:
    """Bytes that a call holds at its peak beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(
    case: Case,
    dtype: torch.dtype,
    *,
    compile: bool = True,
    check: bool = True,
    seconds: float = 1.0,
    device: str = "cpu",
    backend: str = "auto",
    gradients: bool = False,
) -> Row:
    """Time one case against torch's own ways, interleaved.

    Args:
        device: "cpu" or "cuda".   backend: as the ops take it.
        gradients: forward and backward; the bound is then that of three times the operations and
            twice the bytes of the forward.
    """
    function = registry.FUNCTIONS[case.op]
    inputs = case.inputs(dtype, device)
    red = None
    if check:
        try:
            with torch.no_grad():
                hold_to_rule(function, inputs, backend=backend)
            if gradients:
                hold_to_rule(function, inputs, gradients=True, backend=backend)
        except AssertionError as error:
            red = str(error)
    tensors = tuple(v for v in inputs.values() if isinstance(v, torch.Tensor))
    given = {name: v for name, v in inputs.items() if v is not None}
    candidates = {
        "ours": _written_out(function, given | {"backend": backend}),
        "eager": case.torch_call(inputs),
    }
    if compile:
        candidates["compile"] = _compiled(case, inputs)
    peers = _peers(case, inputs)
    candidates |= peers
    on_gpu = device == "cuda"
    if gradients:
        candidates = {name: _with_gradients(c, inputs) for name, c in candidates.items()}
    hopper = _on_hopper(candidates["ours"]) if on_gpu else None
    if hopper:
        candidates["hopper"] = hopper
    with torch.set_grad_enabled(gradients):
        options = {"wait": torch.cuda.synchronize} if on_gpu else {}
        taken = timing.interleave(candidates, seconds=seconds, **options)
        peaks = {name: _peak(call) for name, call in candidates.items()} if on_gpu else {}
    threads = torch.get_num_threads()
    flops, nbytes = case.flops * (3 if gradients else 1), case.bytes(dtype) * (1 + gradients)
    if on_gpu:
        limit = timing.gpu_bound(flops, nbytes, dtype)
    else:
        limit = timing.bound(flops, nbytes, dtype, threads)
    compiled = taken.get("compile")
    return Row(
        op=case.op,
        case=case.name,
        shape=case.shape,
        dtype=checks.name_of(dtype),
        threads=threads,
        backend=backends.resolve(case.op, backend, tensors),
        us=taken["ours"].minimum * 1e6,
        us_median=taken["ours"].median * 1e6,
        eager_us=taken["eager"].minimum * 1e6,
        eager_us_median=taken["eager"].median * 1e6,
        compile_us=compiled and compiled.minimum * 1e6,
        compile_us_median=compiled and compiled.median * 1e6,
        bound_us=limit.seconds * 1e6,
        limit=limit.limit,
        red=red,
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        gradients=gradients,
        peers_us={name: taken[name].minimum * 1e6 for name in peers},
        peers_us_median={name: taken[name].median * 1e6 for name in peers},
        hopper_us=taken["hopper"].minimum * 1e6 if hopper else None,
        peak_bytes=peaks,
    )


HEADER = (
    f"{'op':<21}{'case':<19}{'dtype':<9}{'us':>10}{'eager':>10}{'compile':>10}"
    f"{'bound':>10}{'share':>7}{'speed-up':>10}"
)


def line(row: Row) -> str:
    """The row as text under HEADER: minima."""
    compiled = f"{row.compile_us:>10.1f}" if row.compile_us else f"{'-':>10}"
    speedup = "red" if row.red else f"{row.speedup:.2f}x"
    return (
        f"{row.op:<21}{row.case:<19}{row.dtype:<9}{row.us:>10.1f}{row.eager_us:>10.1f}{compiled}"
        f"{row.bound_us:>10.1f}{row.share:>6.0%} {speedup:>9}"
    )


def run(
    ops: Iterable[str] | None = None,
    dtypes: Iterable[str | torch.dtype] = ("fp32", "bf16"),
    threads: int | None = None,
    out: str | Path | None = None,
    compile: bool = True,
    *,
    cases: Iterable[str] | None = None,
    check: bool = True,
    seconds: float = 1.0,
    show: Callable[[str], object] = print,
    device: str = "cpu",
    backend: str = "auto",
    gradients: bool = False,
) -> list[Row]:
    """Run the benchmark cases of the ops, show a line for each as it comes, write JSON.

    Args:
        ops: names; None for all.
        dtypes: "fp32", "bf16", "fp16" or torch dtypes.
        threads: None for torch's own number.
        out: JSON file; None for bench/results/<machine>/ops.json in a checkout; "" for none.
        compile: also time torch.compile, which takes seconds per case to compile.
        cases: names of cases; None for all marked "bench".
        check: hold each case to the numerics rule first.
        seconds: measuring time of one case.
        show: called with each line of text.
        device, backend, gradients: as measure() takes them.
    Raises:
        ValueError: unknown op, dtype or case, or a device that is not there.
    """
    checks.is_choice("bench", "device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: --device cuda needs a GPU, and torch.cuda.is_available() is False")
    ops = tuple(registry.FUNCTIONS) if ops is None else tuple(ops)
    dtypes = [timing.dtype_named(d) for d in dtypes]
    for op in ops:
        checks.is_choice("bench", "op", op, tuple(registry.FUNCTIONS))
    chosen = [case for op in ops for case in registry.cases(BENCH, op)]
    if cases is not None:
        cases = tuple(cases)
        for name in cases:
            checks.is_choice("bench", "case", name, tuple(dict.fromkeys(c.name for c in chosen)))
        chosen = [case for case in chosen if case.name in cases]
    rows = []
    with timing.threads(threads) as count:
        busy = timing.others_busy()
        show(f"{timing.machine_cpu()}, {count} threads, torch {torch.__version__}; microseconds")
        if busy is not None and busy > timing.BUSY:
            show(f"other processes use {busy:.0%} of the cores: trust ratios at most")
        show(HEADER)
        for case in chosen:
            for dtype in dtypes:
                row = measure(
                    case,
                    dtype,
                    compile=compile,
                    check=check,
                    seconds=seconds,
                    device=device,
                    backend=backend,
                    gradients=gradients,
                )
                rows.append(row)
                show(line(row))
                others = row.peers_us | ({"ours on Hopper": row.hopper_us} if row.hopper_us else {})
                if others:
                    show("  " + ", ".join(f"{k} {v:.1f}" for k, v in others.items()))
                if row.red:
                    show(f"  numerics: {row.red}")
        if out is None:
            where = timing.machine_name()
            if device == "cuda":
                where = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
            name = "ops_gradients.json" if gradients else "ops.json"
            out = RESULTS / where / name if RESULTS.parent.is_dir() else ""
        if out:
            path = timing.write(Path(out), [asdict(row) for row in rows], others_busy_before=busy)
            show(f"written to {path}")
    return rows

"""The launch table, measured: `cgpt-kernels tune` on the GPU at hand.

For each configuration that a call of CALLS asks for, every candidate is compiled, launched alone on
the call's own tensors and timed; the fastest goes into the table with what was measured. Then whole
backends are compared, op by op, for what `auto` tries first. Nothing of this happens at run time:
the table is a file, and a change of it is reviewed like code.
"""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources

from . import backends, bench, checks
from .ops import registry
from .ops.attention import attention_triton
from .ops.cross_entropy import cross_entropy_triton
from .ops.gemm import gemm_triton
from .ops.gemm.cases import GemmCase
from .ops.layer_norm import layer_norm_triton
from .triton_substrate import launch, machine_code

BF16, FP32 = torch.bfloat16, torch.float32


def layer_norm(C, dtype=BF16, rows=512):
    x, w = torch.randn(rows, C, dtype=dtype), torch.randn(C, dtype=dtype)
    mean = torch.randn(rows)
    layer_norm_triton.layer_norm_fwd(x, x, w, w, x, x, mean, mean, 1e-5)
    layer_norm_triton.layer_norm_bwd(x, x, x, w, w, mean, mean, (True, True, True))


def gemm(M, N, K, dtype=BF16, layout="kn"):
    """Forward for a backward, then the backward, with everything in the epilogue."""
    x, y, bias = (torch.randn(*shape, dtype=dtype) for shape in ((M, K), (M, N), (N,)))
    weight = torch.randn((K, N) if layout == "kn" else (N, K), dtype=dtype)
    gemm_triton.gemm_fwd_with_pre(x, weight, bias, y, "gelu", layout)
    needs = (True, True, True)
    gemm_triton.gemm_bwd(y, x, weight, bias, y, "gelu_tanh", layout, needs)


def attention(D, dtype=BF16, S_q=1024, S_k=1024, dropout_p=0.0, bias=False, masks=False, B=2, H=12):
    """Forward and backward of one layer of GPT-2, q, k and v as one projection leaves them."""
    q = torch.randn(B, S_q, 3, H, D, dtype=dtype)[:, :, 0].transpose(1, 2)
    k, v = torch.randn(B, S_k, 3, H, D, dtype=dtype)[:, :, 1:].transpose(1, 3).unbind(2)
    out, lse = torch.randn(B, S_q, H, D, dtype=dtype).transpose(1, 2), torch.randn(B, H, S_q)
    padding = torch.zeros(B, S_k, dtype=torch.bool) if masks else None
    slopes = torch.randn(H) if masks else None
    added = torch.randn(1, H, S_q, S_k, dtype=dtype) if bias else None
    wide = added.expand(B, H, S_q, S_k) if bias else None
    options = 0.125, True, dropout_p, 7
    attention_triton.attention_fwd(q, k, v, padding, wide, slopes, out, lse, *options)
    if S_q > 1 or bias:
        given = (out, q, k, v, out, lse, padding, added, slopes)
        attention_triton.attention_bwd(*given, *options, bias)


def cross_entropy(M, K, V, dtype=BF16):
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((M, K), (V, K), (V,)))
    target, row = torch.randint(V, (M,)), torch.randn(M)
    options = -100, 0.1
    cross_entropy_triton.linear_cross_entropy_fwd(x, weight, bias, target, row, row, *options)
    given = (row, x, weight, target, bias, row)
    cross_entropy_triton.linear_cross_entropy_bwd(*given, *options, (True, True, True))


# One call per launch configuration, at the shapes of the models that it is for.
CALLS = {
    "layer_norm C=128": lambda: layer_norm(128),
    "layer_norm C=768": lambda: layer_norm(768),
    "layer_norm C=1536": lambda: layer_norm(1536),
    "layer_norm C=2560": lambda: layer_norm(2560),
    "layer_norm C=5120": lambda: layer_norm(5120),
    "layer_norm C=5120 fp32": lambda: layer_norm(5120, FP32),
    "gemm 1x3072x768": lambda: gemm(1, 3072, 768),
    "gemm 512x768x3072": lambda: gemm(512, 768, 3072),
    "gemm 8192x3072x768": lambda: gemm(8192, 3072, 768),
    "gemm 8192x3072x768 nk": lambda: gemm(8192, 3072, 768, layout="nk"),
    "gemm 4x768x768 fp32": lambda: gemm(4, 768, 768, FP32),
    "gemm 512x3072x768 fp32": lambda: gemm(512, 3072, 768, FP32),
    "cross_entropy 512x768x50257": lambda: cross_entropy(512, 768, 50257),
    "cross_entropy 512x768x50257 fp32": lambda: cross_entropy(512, 768, 50257, FP32),
    "attention D=64": lambda: attention(64),
    "attention D=128": lambda: attention(128),
    "attention D=256": lambda: attention(256),
    "attention D=64 masks": lambda: attention(64, masks=True),
    "attention D=64 dropout": lambda: attention(64, dropout_p=0.1, masks=True),
    "attention D=64 bias": lambda: attention(64, bias=True),
    "attention D=128 dropout": lambda: attention(128, dropout_p=0.1),
    "attention D=128 bias": lambda: attention(128, bias=True),
    "attention D=64 fp32": lambda: attention(64, FP32),
    "attention D=128 fp32": lambda: attention(128, FP32),
    "attention D=64 fp32 dropout": lambda: attention(64, FP32, dropout_p=0.1),
    "attention D=64 decode": lambda: attention(64, S_q=1),
    "attention D=128 decode": lambda: attention(128, S_q=1),
    "attention D=64 fp32 decode": lambda: attention(64, FP32, S_q=1),
}

# Values to try by kind of argument; what spills or does not fit is passed over.
CANDIDATES = {
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (32, 64, 128, 256),
    "BLOCK_K": (32, 64, 128),
    "BLOCK_R": (1, 2, 4, 8),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
# Arguments whose values follow from the shape class, not from speed alone.
_FIXED = ("GROUP_M", "PROGRAMS", "ROWS_EACH", "CHUNK", "V_EACH", "BLOCK_P", "BLOCK_C")


def candidates(standing: dict[str, int]) -> list[dict[str, int]]:
    """What to try instead of a configuration, itself first."""
    names = [n for n in standing if n in CANDIDATES and n not in _FIXED]
    # a dimension of 16 is a class of its own: so few rows or columns
    lists = [
        (standing[n],) if n.startswith("BLOCK") and standing[n] == 16 else CANDIDATES[n]
        for n in names
    ]
    tried = [standing | dict(zip(names, v, strict=True)) for v in itertools.product(*lists)]
    return [standing, *(c for c in tried if c != standing)]


def microseconds(launches: list[machine_code.Launch]) -> float:
    """Median time of the launches one after the other, by CUDA events."""
    from triton.testing import do_bench

    def run():
        for launched in launches:
            launched.kernel[launched.grid](**launched.arguments, **launched.options)

    return do_bench(run, warmup=10, rep=50, return_mode="median") * 1e3


def tune(
    prefix: str = "",
    *,
    device: str = "cuda",
    time: Callable[[list[machine_code.Launch]], float] = microseconds,
    choices: Callable[[dict], Iterable[dict]] = candidates,
    measure: Callable[..., bench.Row] = bench.measure,
    show: Callable[[str], object] = print,
    out: Path = launch.TABLE_PATH,
) -> dict:
    """Measure the calls whose name starts with prefix, write the table to out and return it.

    Raises:
        ValueError: no GPU, or no such call.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("tune: needs an NVIDIA GPU, torch.cuda.is_available() is False here")
    names = [name for name in CALLS if name.startswith(prefix)]
    chosen = [op for op in backends.OPS if f"auto {op}".startswith(prefix)]
    if not names and not chosen:
        checks.is_choice("tune", "prefix", prefix, (*CALLS, *(f"auto {op}" for op in backends.OPS)))
    where = torch.device(device)
    index = torch.cuda.current_device() if where.type == "cuda" else None
    capability, measured = launch.capability(index), {}
    for name in names:
        for asked in dict.fromkeys(x.asked for x in machine_code.launches(CALLS[name], where)):
            if asked not in measured:
                measured[asked] = _best(asked, name, where, capability, time, choices, show)
    for (kernel, which), found in measured.items():
        if found is not None:
            found |= {
                "device": torch.cuda.get_device_name(index) if index is not None else device,
                "date": datetime.date.today().isoformat(),
                "torch": torch.__version__,
            }
            entry = launch.table()[kernel][which]
            entry["measured"] = (entry["measured"] or {}) | {capability: found}
    if chosen:
        here = device if index is None else torch.cuda.get_device_name(index)
        found = {op: _compare(op, device, measure, show) for op in chosen}
        launch.auto()[here] = launch.auto().get(here, {}) | found
    out.write_text(launch.as_text())
    backends.measured.cache_clear()
    show(f"written to {out}")
    return launch.table()


def _best(asked, name, where, capability, time, choices, show) -> dict | None:
    """Leaves the fastest candidate in the table; what was measured, None where nothing ran."""
    kernel, which = asked
    entry = launch.table()[kernel][which]
    standing, times = entry[capability], []
    for values in choices(standing):
        entry[capability] = values
        launch.config.cache_clear()
        launches = [x for x in machine_code.launches(CALLS[name], where) if x.asked == asked]
        try:
            times.append((time(launches), values))
        except (CompilationError, OutOfResources) as error:
            show(f"{kernel}, {which}: {values} does not fit: {str(error)[:80]}")
    entry[capability] = standing
    if times:
        fastest, entry[capability] = min(times, key=lambda pair: pair[0])
        before = times[0][0] if times[0][1] == standing else None
        show(f"{kernel}, {which}: {fastest:.1f} us, {entry[capability]} of {len(times)}")
    launch.config.cache_clear()
    return (
        {"call": name, "us": fastest, "us_before": before, "tried": len(times)} if times else None
    )


# Cases beside the benchmarks', which end at 512 rows: a batch of training, as bench_gpu has it.
_TRAINED = {"gemm": [GemmCase(name="fc_8192", why="", M=8192, N=3072, K=768, activation="gelu")]}


def _compare(op: str, device: str, measure, show) -> dict[str, dict[str, float | None]]:
    """Class of shape -> backend -> its time as a share of eager's, None where it is not as exact.

    The geometric mean over the cases of the class: of forward and backward, but of the
    forward alone where rows are few, as in decoding.
    """
    taken: dict[str, dict[str, list[float]]] = {}
    cases = [*registry.cases("bench", op), *_TRAINED.get(op, ())]
    for case, dtype in itertools.product(cases, (BF16, FP32)):
        given = case.inputs(dtype, device).values()
        tensors = tuple(v for v in given if isinstance(v, torch.Tensor))
        which = backends.shape_class(op, tensors)
        for name in backends.AUTO["cuda"]:
            if name == "eager" or backends.why_not(op, name, tensors) is not None:
                continue
            training = "few" not in which and "M <= 16" not in which
            options = {"device": device, "backend": name, "gradients": training, "compile": False}
            row = measure(case, dtype, **options)
            share = math.inf if row.red else row.us_median / row.eager_us_median
            taken.setdefault(which, {}).setdefault(name, []).append(share)
    found = {}
    for which, by_name in taken.items():
        means = {n: math.prod(x) ** (1 / len(x)) for n, x in by_name.items()}
        found[which] = {n: round(x, 3) if x < math.inf else None for n, x in means.items()}
        found[which]["eager"] = 1.0
        show(f"auto, {op}, {which}: {found[which]}")
    return found

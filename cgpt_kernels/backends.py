"""The table of backends: which can run an op on given tensors, which one does, and why.

An implementation is found by its name, never registered by hand: `<kernel>` in the module `_C` for
cpu, `<kernel>_cuda` for cuda, and for triton and wafer the function `<kernel>` in the file
`ops/<folder>/<folder>_<backend>.py`, which cuda may have too, for the memory its kernels work in.
All take the same arguments (outputs allocated by the caller).
`auto` may fall back; a backend asked for by name runs or raises.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import checks

try:
    _C = importlib.import_module("cgpt_kernels._C")
except ImportError as error:  # the reason is kept and told by resolve and explain
    _C = None
    _C_REASON = (
        "cgpt_kernels._C is not built; run `python setup.py build_ext --inplace` or "
        f"`pip install .` ({error})"
    )
else:
    _C_REASON = None

# Set, the CUDA kernels run on CPU tensors through the host implementation, for tests: "1" for the
# module that CGPT_CUDA=host builds, "asan" for the one with sanitizers. Read once.
_HOST = os.environ.get("CGPT_CUDA_HOST")
_CUDA_HOST = None
if _HOST:
    _CUDA_HOST = importlib.import_module(
        "cgpt_kernels._cuda_host" + ("" if _HOST == "1" else f"_{_HOST}")
    )

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """What a backend is, whatever the op: where its tensors live and their dtypes."""

    name: str
    what: str
    devices: tuple[str, ...]  # empty: any
    dtypes: tuple[torch.dtype, ...]


BACKENDS = {
    b.name: b
    for b in (
        Backend("cpu", "C++ kernels, tier chosen at run time", ("cpu",), KERNEL_DTYPES),
        Backend("cuda", "CUDA kernels", ("cuda",), KERNEL_DTYPES),
        Backend("triton", "Triton kernels", ("cuda",), KERNEL_DTYPES),
        Backend("wafer", "simulated grid of cores", ("cpu",), KERNEL_DTYPES),
        Backend("eager", "plain PyTorch, the reference", (), checks.FLOATING),
    )
}

# What `auto` tries, by device; the simulator is never chosen for anyone. On a GPU that
# `cgpt-kernels tune` has measured, the fastest of the call's class comes first.
AUTO = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}


@dataclass(frozen=True)
class Op:
    """One public op. Creating it puts it into OPS.

    Args:
        folder: its folder under ops/.
        kernel: name of its forward function in `_C` and in the backend files.
        first: name of its first tensor, for messages.
        shape_class: of the call's tensors; calls of one class, in 16 bits or 32, have one order of
            backends under `auto`.
    """

    name: str
    folder: str
    kernel: str
    first: str = "x"
    shape_class: Callable[[tuple], str] = lambda tensors: "any"

    def __post_init__(self):
        OPS[self.name] = self


OPS: dict[str, Op] = {}


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, as Triton found it set when it was imported."""
    return importlib.import_module("cgpt_kernels.triton_substrate.device").INTERPRETED


# backend -> op -> `unsupported` of the backend's file: (the call's tensors) -> reason or None.
# Plain dicts, because torch.compile looks into them; it does so once for all ops of a graph, so
# those of a backend are there before the first of its ops is.
_LIMITS: dict[str, dict[str, Callable]] = {"cuda": {}, "triton": {}, "wafer": {}}


@functools.cache
def _find_limits(backend: str) -> None:
    for op, folder in ((op.name, op.folder) for op in OPS.values()):
        limits = _beside(folder, "unsupported", backend)
        if limits is not None:
            _LIMITS[backend][op] = limits


@torch.compiler.assume_constant_result  # what is built and installed: nothing to trace or to guard
def _missing(op: str, backend: str) -> str | None:
    return implementation(op, backend)[1]


@functools.cache
def implementation(op: str, backend: str) -> tuple[Callable | None, str | None]:
    """The forward function of a compiled backend, or None and the reason it is missing."""
    backend = backend.partition(":")[0]
    folder, kernel = OPS[op].folder, OPS[op].kernel
    if backend in ("cpu", "cuda"):
        name = kernel if backend == "cpu" else f"{kernel}_cuda"
        module = _C if backend == "cpu" else cuda_kernels()
        if module is None:
            return None, _C_REASON
        found = getattr(module, name, None)
        if found is not None:
            if backend == "cuda":
                _find_limits(backend)
            # A kernel that works in memory of the caller's has a function that allocates it.
            return (backend == "cuda" and _beside(folder, kernel)) or found, None
        if module is _C and backend == "cuda" and not _C.cuda_built():
            return None, "this build has no CUDA code (nvcc was not found or CGPT_CUDA=off)"
        suffix = "cpp" if backend == "cpu" else "cu"
        return None, f"no file csrc/ops/{folder}/{folder}_{backend}.{suffix} in this build"
    module = f"cgpt_kernels.ops.{folder}.{folder}_{backend}"
    if importlib.util.find_spec(module) is None:
        return None, f"no file ops/{folder}/{folder}_{backend}.py"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return None, "triton is not installed: pip install 'cgpt-kernels[triton]'"
    _find_limits(backend)
    found = getattr(importlib.import_module(module), kernel, None)
    reason = None if found else f"ops/{folder}/{folder}_{backend}.py has no {kernel}"
    return found, reason


@functools.cache
def own(op: str, backend: str, name: str) -> Callable | None:
    """A function that a backend's Python file may offer beside its forward, such as the backward;
    None where it does not, and the op's plain torch operations serve."""
    forward, _ = implementation(op, backend)
    backend = backend.partition(":")[0]
    if forward is None or backend == "cpu":
        return None
    folder = OPS[op].folder
    if backend == "cuda":
        return _beside(folder, name)
    return getattr(importlib.import_module(forward.__module__), name, None)


def _beside(folder: str, name: str, backend: str = "cuda") -> Callable | None:
    """A function of ops/<folder>/<folder>_<backend>.py, or None without it or the file."""
    module = f"cgpt_kernels.ops.{folder}.{folder}_{backend}"
    if importlib.util.find_spec(module) is None:
        return None
    return getattr(importlib.import_module(module), name, None)


def cuda_kernels():
    """The module whose functions `<kernel>_cuda` the files ops/<op>/<op>_cuda.py call."""
    return _CUDA_HOST or _C


@torch.compiler.assume_constant_result
def traced(backend: str) -> str:
    """A backend as a graph of torch.compile names it: kernels that lie open in the graph go into
    torch's caches on disk, so their name carries a hash of what they are made of. Where the
    interpreter runs them, or another backend's code does, the graph holds a call."""
    if backend != "triton" or _interpreted():
        return backend
    return f"triton:{importlib.import_module('cgpt_kernels.triton_substrate.launch').fingerprint()}"


def is_traced(backend: str) -> bool:
    """Whether `traced` named it."""
    return backend.startswith("triton:")


def runnable(op: str, device: str) -> list[str]:
    """The backends that have the op for tensors on a device, whatever their dtypes and shapes."""
    return [
        name
        for name in BACKENDS
        if name == "eager" or (_missing(op, name) is None and device in _devices(name))
    ]


def _devices(backend: str) -> tuple[str, ...]:
    devices = BACKENDS[backend].devices
    if backend == "cuda" and _CUDA_HOST:
        return ("cpu",)
    return (*devices, "cpu") if backend == "triton" and _interpreted() else devices


def takes(backend: str, x: torch.Tensor) -> bool:
    """Whether a backend's kernels take tensors like x, by device and dtype."""
    return x.device.type in _devices(backend) and x.dtype in BACKENDS[backend].dtypes


def why_not(op: str, backend: str, tensors: tuple) -> str | None:
    """The reason why a backend cannot run the op on these tensors, or None when it can."""
    x, what = tensors[0], BACKENDS[backend]
    if backend != "eager":
        reason = _missing(op, backend)
        if reason is not None:
            return reason
    devices = () if backend == "eager" else _devices(backend)
    first = OPS[op].first
    if devices and x.device.type not in devices:
        return f"{first} is on {x.device.type}"
    if x.dtype not in what.dtypes:
        return (
            f"{first} is {checks.name_of(x.dtype)}, "
            f"it takes {checks.one_of(map(checks.name_of, what.dtypes))}"
        )
    limits = _LIMITS.get(backend, {}).get(op)
    return limits(*tensors) if limits else None


@functools.cache
def measured() -> dict:
    """Device's name -> op -> class -> {backend: its time as a share of eager's, or None where it
    was not as exact}: the part of the launch table that says what `auto` does."""
    path = Path(__file__).parent / "triton_substrate" / "launch.json"
    return json.loads(path.read_text())["auto"]


@torch.compiler.assume_constant_result
def _is_measured(op: str, index: int | None) -> bool:
    return bool(measured()) and op in measured().get(torch.cuda.get_device_name(index), {})


def _times(op: str, which: str, index: int | None) -> dict[str, float | None]:
    return measured()[torch.cuda.get_device_name(index)][op].get(which, {})


@torch.compiler.assume_constant_result
def _by_time(op: str, which: str, index: int | None) -> tuple[str, ...]:
    """AUTO's backends of a GPU: those that were not measured, the others by time, the inexact."""
    times = _times(op, which, index)

    def place(name):
        return float("inf") if times.get(name, 0.0) is None else times.get(name, 0.0)

    return tuple(sorted(AUTO["cuda"], key=place))


def shape_class(op: str, tensors: tuple) -> str:
    """The class whose measured times say what `auto` does with a call."""
    bits = "16 bit" if tensors[0].element_size() == 2 else "fp32"
    return f"{bits}, {OPS[op].shape_class(tensors)}"


def _order(op: str, tensors: tuple) -> tuple[str, ...]:
    """What `auto` tries, in this order."""
    device = tensors[0].device
    if device.type == "cuda" and _is_measured(op, device.index):
        return _by_time(op, shape_class(op, tensors), device.index)
    return AUTO.get(device.type, ("eager",))


def resolve(op: str, requested: str, tensors: tuple) -> str:
    """The backend that runs the op.

    Args:
        op: a name in OPS.
        requested: "auto" or a backend's name.
        tensors: the call's tensors in the order of its signature, None where absent.
    Raises:
        ValueError: unknown name, or one that cannot run these tensors.
    """
    if requested == "auto":
        for name in _order(op, tensors):
            if why_not(op, name, tensors) is None:
                return name
        requested = "eager"
    checks.is_choice(op, "backend", requested, ("auto", *BACKENDS))
    reason = why_not(op, requested, tensors)
    if reason is not None:
        able = [b for b in BACKENDS if why_not(op, b, tensors) is None]
        raise ValueError(
            f"{op}: backend {requested!r} cannot run: {reason}. "
            f"Available here: {', '.join(able) or 'none'}."
        )
    return requested


def lean_kernels(op: str) -> dict[tuple[str, torch.dtype], Callable]:
    """{(requested backend, dtype): kernel} for tensors on the CPU; empty where `_C` lacks it."""
    kernel, _ = implementation(op, "cpu")
    if kernel is None:
        return {}
    return {(asked, dtype): kernel for asked in ("auto", "cpu") for dtype in KERNEL_DTYPES}


@dataclass(frozen=True)
class Explanation:
    """What `auto` does for a call, and for each backend whether it could and why not."""

    op: str
    tensors: str
    backend: str
    rows: tuple[tuple[str, bool, str], ...]  # backend, whether it can run, why (not)

    def __str__(self) -> str:
        head = f"{self.op}({self.tensors}) runs on backend {self.backend!r}"
        lines = [f"  {name:<7}{'yes' if able else 'no':<5}{why}" for name, able, why in self.rows]
        return "\n".join([head, *lines])

    __repr__ = __str__


def explain(op: str | Callable, *tensors: torch.Tensor | None) -> Explanation:
    """Which backend `auto` picks for an op on these tensors, and why each other one is not it.

    Args:
        op: the op's name or the function itself, e.g. "gemm" or ck.ops.gemm.
        tensors: the call's tensors in the order of its signature.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", op)
    checks.is_choice("explain", "op", name, tuple(OPS))
    if not tensors:
        raise ValueError(f"explain: pass the tensors of the call, {OPS[name].first} first")
    for i, t in enumerate(tensors):
        if not hasattr(t, "shape") and (t is not None or i == 0):
            checks.is_tensor("explain", f"tensors[{i}]", t, optional=i > 0)
    tensors = tuple(t if t is None else torch.as_tensor(t) for t in tensors)
    chosen, times, device = resolve(name, "auto", tensors), {}, tensors[0].device
    if device.type == "cuda" and _is_measured(name, device.index):
        times = _times(name, shape_class(name, tensors), device.index)
    rows = []
    for backend, what in BACKENDS.items():
        reason = why_not(name, backend, tensors)
        if reason is not None:
            why = reason
        elif backend == chosen:
            tier = f", tier {_C.cpu_isa()}" if backend == "cpu" else ""
            why = f"chosen: {what.what}{tier}"
        else:
            why = f"runs when asked for: {what.what}"
        if reason is None and backend in times:
            share = times[backend]
            why += ", was not exact" if share is None else f", took {share:.2f} of eager's time"
        rows.append((backend, reason is None, why))
    shown = ", ".join(
        "None" if t is None else f"{checks.name_of(t.dtype)}{list(t.shape)}" for t in tensors
    )
    return Explanation(name, f"{shown} on {tensors[0].device}", chosen, tuple(rows))

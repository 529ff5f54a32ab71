"""Launch configurations: frozen, one table, chosen by compute capability and class of shape.

Nothing is tuned at run time: the same call launches the same code on every run. `launch.json` holds
for each kernel and class of shape the reason for the values, the values per compute capability, and
what `cgpt-kernels tune` measured where it was run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .device import INTERPRETED

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
# What Inductor decides for all kernels alike; its way is the one written here, fused.
_UNTRACED = ("enable_fp_fusion",)
_hooks = triton.knobs.runtime

TABLE_PATH = Path(__file__).with_name("launch.json")
# Compute capabilities with values of their own; others take the nearest one below, if they have as
# much shared memory: 227 kB per block on 9.0 and 10.0, 99 kB on 8.6, 8.9 and 12.0, which 8.0's fit.
CAPABILITIES = ("8.0", "9.0", "10.0")
_LARGE_SHARED = 200_000


@functools.cache
def table() -> dict:
    """kernel -> class of shape -> {"why", "8.0", "9.0", "10.0", "measured"}, and "interpreter" for
    values that it takes instead of some of 8.0's."""
    return json.loads(TABLE_PATH.read_text())["kernels"]


@functools.cache
def auto() -> dict:
    """What backends.measured() reads from the same file, to be written."""
    return json.loads(TABLE_PATH.read_text())["auto"]


_pretended: str | None = None


@contextlib.contextmanager
def as_if(capability: str):
    """All tensors count as on a GPU of this capability, be they meta, fake or the interpreter's."""
    global _pretended
    before, _pretended = _pretended, capability
    config.cache_clear()
    try:
        yield
    finally:
        _pretended = before
        config.cache_clear()


def capability(device: int | None) -> str:
    """The entry of CAPABILITIES for a device; 8.0 for the interpreter."""
    if INTERPRETED or device is None or _pretended is not None:
        return _pretended or CAPABILITIES[0]
    found = torch.cuda.get_device_properties(device)
    if found.shared_memory_per_block_optin < _LARGE_SHARED:
        return CAPABILITIES[0]
    own = (found.major, found.minor)
    below = [c for c in CAPABILITIES if tuple(map(int, c.split("."))) <= own]
    return below[-1] if below else CAPABILITIES[0]


@functools.cache
def config(kernel: str, shape_class: str, device: int | None) -> dict[str, int]:
    """Block sizes and options of a kernel for a class of shape on a device.

    A product and the sum it goes into are one rounding (FMA), said in so many words: Triton 3.10
    changes its default.
    """
    entry = table()[kernel][shape_class]
    chosen = entry[capability(device)] | {"enable_fp_fusion": True}
    # a program costs the interpreter milliseconds whatever its size
    return chosen | entry.get("interpreter", {}) if INTERPRETED else chosen


@functools.cache
def fingerprint() -> str:
    """Of the sources of all Triton kernels and of the table."""
    package = Path(__file__).parent.parent
    sources = sorted([*package.glob("triton_substrate/*.*"), *package.glob("ops/*/*triton*.py")])
    return hashlib.sha256(b"".join(s.read_bytes() for s in sources)).hexdigest()[:16]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; of traced sizes too."""
    return (a + b - 1) // b


# Triton releases whose compiled kernels are launched directly: the interface is not a public one.
_LEAN = not INTERPRETED and (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) < (3, 10)
# The last call of a shape that is never seen again would otherwise be kept for ever.
_MOST = 4096
_compiled: dict[tuple, tuple] = {}


def run(
    kernel: JITFunction,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple,
    chosen: dict[str, int],
    free: tuple[int | Tensor, ...] = (),
) -> None:
    """kernel[grid](*tensors, *free, *numbers, **chosen) on the device of the first tensor.

    Three ways:
    lean     on tensors: JITFunction.run looks at every argument to find the compiled kernel, tens
             of microseconds. Here the numbers themselves, and dtype and alignment of the tensors,
             find it in one look-up, which is finer than what Triton specialises on.
    plain    the first time, under hooks (a profiler's), in the interpreter, on another Triton.
    traced   on tensors of torch.compile: the kernel goes into the graph.

    Args:
        free: numbers that Triton is told not to specialise on and that change from call to call.
    """
    first = tensors[0]
    if type(first) not in _PLAIN:
        options = {k: v for k, v in chosen.items() if k not in _UNTRACED}
        wrap_triton(kernel)[grid](*tensors, *free, *numbers, **options)
        return
    device = first.get_device()
    if first.is_cuda and device != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current one
            return run(kernel, grid, tensors, numbers, chosen, free)
    if not _LEAN or _hooks.launch_enter_hook.calls or _hooks.launch_exit_hook.calls:
        kernel[grid](*tensors, *free, *numbers, **chosen)
        return
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    key = (
        id(kernel), device, *numbers, *chosen.values(),
        *[t if t is None else t.dtype for t in tensors],
        *[p if p is None else p & 15 for p in pointers],
    )  # fmt: skip
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*tensors, *free, *numbers, **chosen)
        if isinstance(compiled, CompiledKernel):
            if len(_compiled) >= _MOST:
                _compiled.clear()
            given = len(tensors) + len(free) + len(numbers)
            rest = [chosen[name] for name in kernel.arg_names[given:]]
            # compiled itself too: its end would unload the code
            _compiled[key] = (
                compiled.run,
                compiled.function,
                compiled.packed_metadata,
                rest,
                compiled,
            )
        return
    launch, function, metadata, rest, _ = found
    stream = driver.active.get_current_stream(device)
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    launch(x, y, z, stream, function, metadata, None, None, None, *pointers, *free, *numbers, *rest)


def as_text() -> str:
    """The table as it is written to the file: a line per value, so that a change can be read."""
    note = json.loads(TABLE_PATH.read_text())["note"]
    kernels = []
    for kernel, classes in table().items():
        entries = []
        for which, entry in classes.items():
            values = (f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in entry.items())
            entries.append(f"   {json.dumps(which)}: {{\n" + ",\n".join(values) + "\n   }")
        kernels.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(entries) + "\n  }")
    chosen = [
        f"  {json.dumps(device)}: {{\n"
        + ",\n".join(f"   {json.dumps(op)}: {json.dumps(found)}" for op, found in ops.items())
        + "\n  }"
        for device, ops in auto().items()
    ]
    head = f' "note": {json.dumps(note)},\n "auto": {{' + "".join(["\n"] * bool(chosen))
    head += ",\n".join(chosen) + "\n " * bool(chosen) + "},\n"
    return f'{{\n{head} "kernels": {{\n' + ",\n".join(kernels) + "\n }\n}\n"

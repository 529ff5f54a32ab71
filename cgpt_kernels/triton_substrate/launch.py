"""Launch configurations: frozen, one table, chosen by compute capability and class of shape.

Nothing is tuned at run time: the same call launches the same code on every run. `launch.json` holds
for each kernel and class of shape the reason for the values, the values per compute capability, and
what `cgpt-kernels tune` measured where it was run.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch

from .device import INTERPRETED

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


_pretended = CAPABILITIES[0]


@contextlib.contextmanager
def as_if(capability: str):
    """Tensors that lie on no GPU (meta tensors, the interpreter's) count as on one of this."""
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
    if INTERPRETED or device is None:
        return _pretended
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


def on_device(launcher: Callable) -> Callable:
    """launcher, with the device of its first argument current: Triton launches on that one."""

    @functools.wraps(launcher)
    def run(first, *rest):
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return launcher(first, *rest)
        return launcher(first, *rest)

    return run


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
    return f'{{\n "note": {json.dumps(note)},\n "kernels": {{\n' + ",\n".join(kernels) + "\n }\n}\n"

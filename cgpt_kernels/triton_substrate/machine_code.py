"""What a launcher would launch, compiled for a GPU that need not be there, and what came out.

`record` runs a launcher on meta tensors and notes each kernel, its arguments and its configuration;
`compile_launch` hands those to Triton as a launch on the target would, so that the machine code is
the one that runs; `inspect` reads registers, spills, shared memory and tensor-core instructions
from it. Triton's wheel brings ptxas and cuobjdump: neither a GPU nor a driver is needed.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}
# The instructions that run on tensor cores: mma of Ampere, wgmma of Hopper, tcgen05 of Blackwell.
_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|UTCMMA)\b")
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the kernel, the (kernel, class of shape) whose launch configuration it
    asked for, its grid, its arguments by name, its compile options."""

    kernel: JITFunction
    asked: tuple[str, str]
    grid: tuple[int, ...]
    arguments: dict[str, object]
    options: dict[str, int]


@dataclass(frozen=True)
class MachineCode:
    """What ptxas made of a kernel. Registers per thread, shared memory in bytes."""

    registers: int
    shared: int
    spilled: bool
    tensor_core: tuple[str, ...]


@contextlib.contextmanager
def _recording(into: list[Launch]) -> Iterator[None]:
    run, config, asked = launch.run, launch.config, []

    def look_up(kernel, shape_class, device):
        asked.append((kernel, shape_class))
        return config(kernel, shape_class, device)

    def note(kernel, grid, tensors, numbers, chosen, free=()):
        options = {name: value for name, value in chosen.items() if name in _OPTIONS}
        given = dict(zip(kernel.arg_names, (*tensors, *free, *numbers), strict=False))
        arguments = given | {k: v for k, v in chosen.items() if k not in options}
        into.append(Launch(kernel, asked[-1], grid, arguments, options))

    launch.run, launch.config = note, look_up
    try:
        yield
    finally:
        launch.run, launch.config = run, config


def record(call: Callable[[], object], capability: str) -> list[Launch]:
    """The launches of call(), which allocates on the meta device, as on a GPU of this capability.

    Args:
        capability: an entry of launch.CAPABILITIES.
    """
    if launch.INTERPRETED:
        raise RuntimeError("machine_code: unset TRITON_INTERPRET, the interpreter compiles nothing")
    with launch.as_if(capability):
        return launches(call, "meta")


def launches(call: Callable[[], object], device: str | torch.device) -> list[Launch]:
    """The launches of call(), which allocates on the device; none of them is made."""
    found: list[Launch] = []
    with _recording(found), torch.device(device):
        call()
    return found


def _specialised(value) -> tuple[str, bool]:
    """Triton's type of an argument and whether it is known to be a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype], True  # torch allocates at multiples of 512 bytes
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    raise TypeError(f"machine_code: no Triton type for an argument of {type(value).__name__}")


def compile_launch(what: Launch, capability: str):
    """Triton's compiled kernel of a launch for a compute capability such as "9.0"."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(what.kernel.params):
        value = what.arguments.get(parameter.name, parameter.default)
        specialise = not (parameter.is_constexpr or parameter.do_not_specialize)
        is_one = specialise and type(value) is int and value == 1
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        signature[parameter.name], aligned = _specialised(value)
        if aligned and specialise:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(what.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", int(capability.replace(".", "")), 32)
    return triton.compile(source, target=target, options=what.options)


def inspect(compiled) -> MachineCode:
    """Registers, shared memory, spills and tensor-core instructions of a compiled kernel."""
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])

        def dump(what: str) -> str:
            command = [cuobjdump, what, str(path)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage, sass = dump("--dump-resource-usage"), dump("--dump-sass")
    registers = int(re.search(r"\bREG:(\d+)", usage)[1])
    return MachineCode(
        registers=registers,
        shared=compiled.metadata.shared,
        # loads and stores of local memory are how ptxas spills
        spilled=re.search(r"\b(LDL|STL)\b", sass) is not None,
        tensor_core=tuple(sorted(set(_TENSOR_CORE.findall(sass)))),
    )

"""What this machine and this installation can do: `ck.doctor()` and `cgpt-kernels doctor`."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import backends, timing
from .assets import TINY
from .ops import registry
from .ops.case import BENCH

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TIERS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx", "amx_emulated")
# libgomp, LLVM's and Intel's runtimes read these; whoever compares timings must know them.
_OMP = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "GOMP_CPU_AFFINITY",
    "GOMP_SPINCOUNT",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
)
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "triton", "numpy")


@dataclass(frozen=True)
class Verdict:
    """What one backend does for some ops: "chosen" by auto, "can" run when asked for, or "no"."""

    backend: str
    state: str
    ops: str
    why: str


@dataclass(frozen=True)
class Report:
    """The findings; prints as text, and as tables through rich."""

    facts: tuple[tuple[str, str], ...]
    verdicts: tuple[Verdict, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict:
        return asdict(self) | {"facts": dict(self.facts)}

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.facts)
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts]
        lines += ["", "backend  auto    ops: why"]
        lines += [f"{v.backend:<9}{v.state:<8}{v.ops}: {v.why}" for v in self.verdicts]
        lines += [""] * bool(self.warnings) + [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)

    __repr__ = __str__

    def __rich__(self):
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        facts.add_column(style="bold", no_wrap=True)
        facts.add_column(overflow="fold")
        for name, value in self.facts:
            facts.add_row(name, Text(value))
        ops = Table("backend", "auto", "ops", "why", box=box.SIMPLE_HEAD, pad_edge=False)
        style = {"chosen": "green", "can": "", "no": "dim"}
        for v in self.verdicts:
            ops.add_row(v.backend, v.state, v.ops, Text(v.why), style=style[v.state])
        warnings = [Text(f"warning: {text}", style="yellow") for text in self.warnings]
        return Group(facts, ops, *warnings)


def doctor() -> Report:
    """Processor, tier, threads, GPU, build, versions, and which backend each op would use and why.

    Nothing is run but a look at the load, 0.2 s. Print the report, or take it apart: `.facts`,
    `.verdicts`, `.warnings`, `.to_dict()`.
    """
    busy = timing.others_busy()
    return Report(tuple(_facts(busy)), tuple(_verdicts()), tuple(_warnings(busy)))


def _facts(busy: float | None):
    yield "cgpt-kernels", _version("cgpt-kernels") or "not installed, run from its source"
    yield "processor", timing.machine_cpu()
    yield "cores", _cores()
    yield "tier", _tier()
    yield "threads", f"{torch.get_num_threads()} (torch.set_num_threads changes it)"
    settings = [f"{name}={os.environ[name]}" for name in _OMP if name in os.environ]
    yield "OpenMP settings", " ".join(settings) or "none"
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    share = "" if busy is None else f", other processes use {busy:.0%} of the cores now"
    yield "load", f"{load} over the last minute{share}"
    yield "GPU", _gpu()
    yield "kernels", _build()
    versions = [(name, _version(name)) for name in _PACKAGES]
    yield "python", f"{platform.python_version()} on {platform.platform(terse=True)}"
    for name, version in versions:
        yield name, version or "not installed"
    yield "shipped model", str(TINY) if (TINY / "config.json").is_file() else "not in this build"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> str:
    count = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    quota = _container_quota()
    text = f"{count}" if usable == count else f"{usable} of {count} (affinity)"
    return text if quota is None else f"{text}, limited to {quota:.3g} by the container"


def _container_quota() -> float | None:
    """Cores that the control group grants this container, None for all of them."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _tier() -> str:
    if backends._C is None:
        return "none, the kernels are not built"
    able = backends._C.cpu_isas()
    forced = os.environ.get("CGPT_CPU_ISA", "auto")
    how = "" if forced in ("", "auto") else f", forced by CGPT_CPU_ISA={forced}"
    missing = ", ".join(name for name in _TIERS if name not in able)
    return (
        f"{backends._C.cpu_isa()}{how}; this processor can run {', '.join(able)}"
        f"{f'; not {missing}' if missing else ''}"
    )


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "none" if built else "none (and this torch is built without CUDA)"
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name} (sm{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)")
    return ", ".join(found)


def _build() -> str:
    if backends._C is None:
        return f"none: {backends._C_REASON}"
    cuda = "with" if backends._C.cuda_built() else "without"
    return f"{Path(backends._C.__file__).name}, {cuda} CUDA"


def _verdicts():
    """One line per backend, state and reason, with the ops and dtypes for which it holds."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    found: dict[tuple[str, str, str], set[tuple[str, str, str]]] = {}
    asked = set()
    for op, function in registry.FUNCTIONS.items():
        case = min(registry.cases(BENCH, op), key=lambda c: c.bytes(torch.float32))
        names = [
            p.name
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        for short, dtype in _DTYPES.items():
            inputs = case.inputs(dtype)
            for device in devices:
                tensors = (inputs.get(name) for name in names)
                tensors = [t if t is None else t.to(device) for t in tensors]
                explanation = backends.explain(op, *tensors)
                asked.add((op, short, device))
                for backend, able, why in explanation.rows:
                    state = "no"
                    if able:
                        state = "chosen" if backend == explanation.backend else "can"
                    why = why.replace(backends.OPS[op].folder, "<op>").removeprefix("chosen: ")
                    found.setdefault((backend, state, why), set()).add((op, short, device))
    order = {name: i for i, name in enumerate(backends.BACKENDS)}
    states = ("chosen", "can", "no")
    for backend, state, why in sorted(found, key=lambda k: (states.index(k[1]), order[k[0]])):
        # Calls whose first tensor lies elsewhere say nothing new about a backend.
        if not re.search(r" is on (cpu|cuda)$", why) or len(devices) == 1:
            yield Verdict(backend, state, _which(found[backend, state, why], asked), why)


def _which(calls: set, asked: set) -> str:
    """`all ops`, or the ops, dtypes and devices of the calls in few words."""
    parts = []
    for axis in range(3):
        have, every = {c[axis] for c in calls}, {c[axis] for c in asked}
        if have != every:
            parts.append(", ".join(sorted(have)))
    return "; ".join(parts) or "all ops"


def _warnings(busy: float | None):
    if backends._C is None:
        yield f"the C++ kernels are missing, every op runs eager: {backends._C_REASON}"
    if busy is not None and busy > timing.BUSY:
        wait = os.environ.get("OMP_WAIT_POLICY", "").lower()
        advice = "" if wait == "passive" else " Set OMP_WAIT_POLICY=passive on a shared machine."
        yield (
            f"other processes use {busy:.0%} of the cores: timings are not to be trusted, and "
            f"threads that wait for each other can be many times slower.{advice}"
        )
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    usable = min(usable or 1, _container_quota() or usable or 1)
    if torch.get_num_threads() > usable:
        yield (
            f"{torch.get_num_threads()} threads on {usable:.3g} cores: set OMP_NUM_THREADS or "
            "torch.set_num_threads to the cores at hand"
        )

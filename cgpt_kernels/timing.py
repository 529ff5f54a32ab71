"""Timing that survives a shared machine: candidates interleaved, minima and medians, load recorded.

Absolute times move from run to run; only times of one interleaved run are compared. Units: seconds,
bytes, FLOP/s, bytes/s.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from . import backends, checks

# One sample lasts at least this long, 100 times the resolution of the clock and of a timer tick's
# disturbance; short enough for some samples to fall between two time slices of another process.
SAMPLE_SECONDS = 0.002
PEAK_SECONDS = 0.5  # time to look for a quiet moment in which a peak shows: 10,000 samples
BUSY = 0.25  # other processes' share of the cores beyond which a run is called disturbed


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    minimum: float
    median: float
    samples: int


def interleave(
    candidates: dict[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    rounds: int = 9,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time all candidates in one run, in turns.

    Args:
        candidates: name and what to call.
        seconds: time to spend on all of them together, exceeded where one call is long.
        rounds: samples of each at least.
        wait: returns when what was called has run, e.g. torch.cuda.synchronize. A sample begins
            and ends with it, so that it holds launches and work as a caller in a loop has them.
    """
    per_sample = {}
    for name, call in candidates.items():
        call()  # first call: packing, compilation, page faults
        wait()
        start = time.perf_counter()
        call()
        wait()
        once = max(time.perf_counter() - start, 1e-7)
        per_sample[name] = max(1, int(SAMPLE_SECONDS / once))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    end = time.perf_counter() + seconds
    turn = 0
    while turn < rounds or time.perf_counter() < end:
        # another one begins each round, so that none always follows the same neighbour
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            call, count = candidates[name], per_sample[name]
            wait()
            start = time.perf_counter()
            for _ in range(count):
                call()
            wait()
            samples[name].append((time.perf_counter() - start) / count)
        turn += 1
    return {
        name: Timing(min(values), statistics.median(values), len(values))
        for name, values in samples.items()
    }


@contextmanager
def threads(count: int | None):
    """torch's and the kernels' thread count within the block; None leaves it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


# ---- what the machine can do --------------------------------------------------------------------


_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}


def peak_flops(dtype: torch.dtype, threads: int) -> float:
    """Highest operations per second that the tier in use has an instruction for, all threads
    together; `threads` is part of the cache's key.

    A dtype can always be computed in a wider one: fp16 as fp32, bf16 as fp32, int8 as bf16.
    """
    wider = {
        torch.int8: torch.bfloat16,
        torch.bfloat16: torch.float32,
        torch.float16: torch.float32,
    }
    own = _peak_flops(dtype, threads)
    return max(own, peak_flops(wider[dtype], threads)) if dtype in wider else own


@functools.cache
def _peak_flops(dtype: torch.dtype, threads: int) -> float:
    """0 where the tier has no instruction for dtype."""
    if backends._C is None or not backends._C.peak_rate("fp32", 0.0):
        return _product_flops(dtype)
    if dtype not in _FORMATS:
        return 0.0
    with ThreadPoolExecutor(threads) as pool:
        rate = functools.partial(backends._C.peak_rate, _FORMATS[dtype])
        return sum(pool.map(rate, [PEAK_SECONDS] * threads))


def _product_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the best of three matrix products by torch, where no instruction is known of."""
    if dtype == torch.int8:
        return 0.0
    calls = {}
    for size in (512, 1024, 1536):
        x, w = torch.randn(2, size, size).to(dtype)
        calls[size] = functools.partial(torch.mm, x, w)
    taken = interleave(calls, seconds=4 * PEAK_SECONDS)
    return max(2 * size**3 / timing.minimum for size, timing in taken.items())


@functools.cache
def _bandwidths(threads: int) -> dict[int, float]:
    """Bytes per second that `threads` read together, by the size of what they share out."""
    largest = 1 << 28
    whole = torch.empty(largest, dtype=torch.uint8).random_()
    best: dict[int, float] = {}
    with ThreadPoolExecutor(threads) as pool:
        for size in (1 << p for p in range(18, 29)):
            part = size // threads // 256 * 256
            parts = [whole[t * part :][:part] for t in range(threads)]
            passes = max(1, (32 << 20) // size)
            read = functools.partial(_read_seconds, passes=passes)
            read_all = functools.partial(pool.map, read, parts)
            # the slower thread sets the time of a turn
            seconds = min(max(read_all()) for _ in range(20))
            best[size] = passes * part * threads / seconds
    return best


def _read_seconds(part: torch.Tensor, passes: int) -> float:
    if backends._C is not None:
        return backends._C.read_seconds(part, passes)
    words = part.view(torch.float32)
    start = time.perf_counter()
    for _ in range(passes):
        words.sum()
    return time.perf_counter() - start


def bandwidth(nbytes: int, threads: int) -> float:
    """Highest read bandwidth of a working set of this size or larger, as it lies in the caches."""
    measured = _bandwidths(threads)
    return max(v for n, v in measured.items() if n >= min(nbytes, max(measured)))


@dataclass(frozen=True)
class Bound:
    """The time no implementation beats on this machine, and what sets it."""

    seconds: float
    limit: str  # "compute" or "bandwidth"


def bound(flops: int, nbytes: int, dtype: torch.dtype, threads: int) -> Bound:
    """The roofline of measured peaks: max(flops / peak FLOP/s, bytes / bandwidth)."""
    compute = flops / peak_flops(dtype, threads)
    memory = nbytes / bandwidth(nbytes, threads)
    return Bound(compute, "compute") if compute > memory else Bound(memory, "bandwidth")


@functools.cache
def _gpu_flops(dtype: torch.dtype) -> float:
    x, w = torch.randn(2, 8192, 8192, device="cuda").to(dtype)
    taken = interleave(
        {"mm": functools.partial(torch.mm, x, w)},
        seconds=4 * PEAK_SECONDS,
        wait=torch.cuda.synchronize,
    )
    return 2 * 8192**3 / taken["mm"].minimum


@functools.cache
def _gpu_bandwidth() -> float:
    source = torch.randn(1 << 28, device="cuda")  # 1 GB, beyond any cache
    into = torch.empty_like(source)
    copy = functools.partial(into.copy_, source)
    taken = interleave({"copy": copy}, seconds=4 * PEAK_SECONDS, wait=torch.cuda.synchronize)
    return 2 * source.nbytes / taken["copy"].minimum


def gpu_bound(flops: int, nbytes: int, dtype: torch.dtype) -> Bound:
    """bound() of the current GPU: torch's product of 8192 cubed, and a copy of 1 GB."""
    compute, memory = flops / _gpu_flops(dtype), nbytes / _gpu_bandwidth()
    return Bound(compute, "compute") if compute > memory else Bound(memory, "bandwidth")


# ---- where and when -----------------------------------------------------------------------------


def _first(pattern: str, path: str) -> str | None:
    try:
        found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    describe = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # installed without its repository


def others_busy(seconds: float = 0.2) -> float | None:
    """Share of the cores that other processes use right now; None where /proc does not tell."""

    def snapshot():
        fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        own = sum(os.times()[:2]) * os.sysconf("SC_CLK_TCK")
        idle = fields[3] + fields[4]
        return sum(fields), sum(fields) - idle - own

    try:
        total, busy = snapshot()
        time.sleep(seconds)
        total_after, busy_after = snapshot()
    except OSError:
        return None
    return max(0.0, (busy_after - busy) / max(total_after - total, 1))


def machine(**more) -> dict[str, object]:
    """Everything a figure needs beside it: device, versions, commit, load, and `more`."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": machine_cpu(),
        "cpu_isa": backends._C and backends._C.cpu_isa(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "others_busy": others_busy(),
        **more,
    }


def machine_cpu() -> str:
    """The processor's model name."""
    named = _first(r"^model name\s*:\s*(.+)$", "/proc/cpuinfo") or platform.processor()
    return named or platform.machine()


def machine_name() -> str:
    """A folder name for this machine: `amd-epyc-9b14-2-cores`, or `amd-epyc-family-26-2-cores`
    where a virtual machine keeps the name to itself; Intel's family 6 needs the model beside it."""
    cpu = re.sub(r"\(r\)|\(tm\)|cpu|processor|@.*", " ", machine_cpu().lower())
    family = _first(r"^cpu family\s*:\s*(.+)$", "/proc/cpuinfo")
    if family is not None and not re.search(r"\d", cpu):
        cpu += f" family {family}"
        if family == "6":
            model = _first(r"^model\s*:\s*(.+)$", "/proc/cpuinfo")
            cpu += f" model {model}"
    return f"{re.sub(r'[^a-z0-9]+', '-', cpu).strip('-')}-{os.cpu_count()}-cores"


def write(path: Path, rows: list[dict], **more) -> Path:
    """Rows and the machine they were taken on, as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(**more), "rows": rows}, indent=1) + "\n")
    return path


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """torch.bfloat16 for "bf16", "bfloat16" or itself."""
    short = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    known = {**short, **{checks.name_of(d): d for d in short.values()}}
    if isinstance(name, torch.dtype):
        return name
    checks.is_choice("bench", "dtype", name, tuple(known))
    return known[name]

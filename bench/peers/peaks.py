"""The roofs: the highest rates of the cores and the memory, taken by peak.c or else by torch.

    python -m peers.peaks FOLDER THREADS     prints them as JSON

Operations per second by format, all threads together, and bytes per second of reading.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).with_name("peak.c")
SECONDS = 0.3  # of each measurement: hundreds of samples, of which the best counts
READ_BYTES = 256 << 20  # far beyond the caches, as large as a small model's weights

# (function of peak.c, processor flag, format)
_RATES = (
    ("fp32_avx2", "fma", "fp32"),
    ("fp32_avx512", "avx512f", "fp32"),
    ("bf16_avx512", "avx512_bf16", "bf16"),
    ("int8_avx512", "avx512_vnni", "int8"),
    ("bf16_amx", "amx_bf16", "bf16"),
    ("int8_amx", "amx_int8", "int8"),
)


def measure(folder: Path, threads: int) -> dict:
    """{"flops": {format: per second}, "bandwidth": bytes per second, "by": how}."""
    flags, compiler = _flags(), shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or not {"avx2", "fma"} <= flags:
        return _by_torch(threads)
    library = folder / "peak.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    if subprocess.run(command, capture_output=True).returncode:
        return _by_torch(threads)
    calls = ctypes.CDLL(str(library))  # calls through it run without the interpreter's lock
    flops: dict[str, float] = {}
    by = {}
    with ThreadPoolExecutor(threads) as pool:
        for function, flag, kind in _RATES:
            if flag in flags:
                call = calls[function]
                call.argtypes, call.restype = [ctypes.c_double], ctypes.c_double
                rate = sum(pool.map(call, [SECONDS] * threads))
                if rate > flops.get(kind, 0.0):
                    flops[kind], by[kind] = rate, function
        bandwidth = _read(calls, pool, threads)
    return {"flops": _complete(flops), "bandwidth": bandwidth, "by": by}


def _read(calls, pool, threads: int) -> float:
    part = READ_BYTES // threads // 256 * 256
    buffers = [bytearray(os.urandom(1 << 20)) * (part >> 20) for _ in range(threads)]
    part = len(buffers[0])
    views = [(ctypes.c_char * part).from_buffer(b) for b in buffers]
    calls.read_once.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    calls.read_once.restype = ctypes.c_double

    def best_of(_):
        return list(pool.map(lambda v: calls.read_once(v, part), views))

    # the slower thread sets the time of a pass
    seconds = min(max(best_of(turn)) for turn in range(30))
    return threads * part / seconds


def _complete(flops: dict[str, float]) -> dict[str, float]:
    """A format may be computed in a wider one: what has no faster instruction takes the wider's."""
    full: dict[str, float] = {}
    fastest = 0.0
    for kind in ("fp32", "bf16", "int8"):
        fastest = full[kind] = max(fastest, flops.get(kind, 0.0))
    full["int4"] = full["int8"]  # unpacked to int8 first
    return full


def _by_torch(threads: int) -> dict:
    import torch

    from cgpt_kernels import timing

    with timing.threads(threads):
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        flops = {kind: timing.peak_flops(dtype, threads) for kind, dtype in dtypes.items()}
        bandwidth = timing.bandwidth(READ_BYTES, threads)
    return {"flops": _complete(flops), "bandwidth": bandwidth, "by": {"all": "torch"}}


def _flags() -> set[str]:
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return set()
    return set(found[1].split()) if found else set()


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))

"""The roofs: the highest rates of the cores and the memory.

    python -m peers.peaks THREADS     prints them as JSON

Operations per second by format, all threads together, and bytes per second of reading.
"""

from __future__ import annotations

import json
import sys

READ_BYTES = 256 << 20  # far beyond the caches, as large as a small model's weights


def measure(threads: int) -> dict:
    """{"flops": {format: per second}, "bandwidth": bytes per second}."""
    import torch

    from cgpt_kernels import timing

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    flops = {kind: timing.peak_flops(dtype, threads) for kind, dtype in dtypes.items()}
    flops["int4"] = flops["int8"]  # unpacked to int8 first
    return {"flops": flops, "bandwidth": timing.bandwidth(READ_BYTES, threads)}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))

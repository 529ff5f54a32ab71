"""The single ops of the target table, each beside torch's own call, interleaved.

    python -m cgpt_kernels.bench_e2e.single THREADS     prints rows as JSON

Linear layers run as `replace` leaves them, with whatever packing it does.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops, timing
from ..replace import replace

SECONDS = 1.0
# name: heads, head size; B 1, S 2048, causal, bf16
ATTENTION = {"attention D64": (12, 64), "attention D128": (12, 128), "attention D80": (12, 80)}
# name: M, K, N; bf16
LINEAR = {"gemm 512 x 768 x 3072": (512, 768, 3072), "gemm M=1, 768 x 768": (1, 768, 768)}


def attention(heads: int, head_dim: int, tokens: int = 2048) -> dict:
    """Seconds of ours and of SDPA; FLOP."""
    q, k, v = torch.randn(3, 1, heads, tokens, head_dim).bfloat16()
    calls = {
        "ours": lambda: ops.attention(q, k, v),
        "torch": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    return _row(calls, 2 * heads * tokens**2 * head_dim)


def linear(M: int, K: int, N: int) -> dict:
    """Seconds of a replaced nn.Linear and of F.linear on the same values; FLOP."""
    x, plain = torch.randn(M, K).bfloat16(), nn.Linear(K, N).bfloat16()
    weight, bias = plain.weight.detach().clone(), plain.bias.detach().clone()
    model = nn.Sequential(plain)
    replace(model)
    calls = {"ours": lambda: model(x), "torch": lambda: F.linear(x, weight, bias)}
    return _row(calls, 2 * M * K * N)


def _row(calls: dict, flops: int) -> dict:
    with torch.no_grad():
        ours, theirs = calls["ours"](), calls["torch"]()
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
        taken = timing.interleave(calls, seconds=SECONDS)
    return {
        "seconds": taken["ours"].minimum,
        "seconds_median": taken["ours"].median,
        "torch": taken["torch"].minimum,
        "torch_median": taken["torch"].median,
        "flops": flops,
    }


def rows() -> list[dict]:
    """One row per case: name, seconds of ours and of torch, FLOP."""
    torch.manual_seed(0)
    found = [{"name": name, **attention(*shape)} for name, shape in ATTENTION.items()]
    return found + [{"name": name, **linear(*shape)} for name, shape in LINEAR.items()]


if __name__ == "__main__":
    with timing.threads(int(sys.argv[1])):
        print(json.dumps(rows()))

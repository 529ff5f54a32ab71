"""Sums over programs in a fixed order: what a backward does instead of atomics.

Each program leaves its share of a sum in a row of its own; one more kernel adds the rows up.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .device import narrow


@triton.jit
def add_shares_kernel(
    a, b, out_a, out_b, programs, C,
    HAS_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    sum_a = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_b = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, programs, BLOCK_P):
        there = (start + p < programs)[:, None] & (c < C)[None, :]
        at = (start + p).to(tl.int64)[:, None] * C + c[None, :]
        sum_a += tl.load(a + at, mask=there, other=0.0)
        if HAS_B:
            sum_b += tl.load(b + at, mask=there, other=0.0)
    tl.store(out_a + c, narrow(tl.sum(sum_a, 0), out_a.dtype.element_ty), mask=c < C)
    if HAS_B:
        tl.store(out_b + c, narrow(tl.sum(sum_b, 0), out_b.dtype.element_ty), mask=c < C)


def add_shares(a: Tensor, out_a: Tensor, b: Tensor | None = None, out_b: Tensor | None = None):
    """out = sum over programs, for one array of shares or two.

    Args:
        a, b: [programs, C], fp32, contiguous.   out_a, out_b: [C], any kernel dtype.
    """
    programs, C = a.shape
    chosen = launch.config("add_shares", "any", a.device.index)
    tensors, numbers = (a, b, out_a, out_b), (programs, C, b is not None)
    launch.run(add_shares_kernel, (launch.cdiv(C, chosen["BLOCK_C"]),), tensors, numbers, chosen)

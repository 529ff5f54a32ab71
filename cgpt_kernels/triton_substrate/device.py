"""Device functions that more than one op uses, and the facts about Triton that they hide.

Under TRITON_INTERPRET=1, read once when Triton is imported, every kernel runs on CPU tensors, as
NumPy arrays. The interpreter keeps bf16 as 16-bit integers, and needs two shims for it:

- it multiplies those integers in tl.dot, so `dot` hands it fp32. A product of two bf16 (or fp16)
  values is exact in fp32, and tl.dot adds up in fp32 on a GPU too: only the order of sums differs.
- it cuts fp32 off instead of rounding to nearest, so `narrow` rounds on the bits.
"""

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
_SHIM = tl.constexpr(INTERPRETED)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def precision(dtype: torch.dtype) -> str:
    """input_precision of tl.dot: IEEE fp32, and TF32 only where torch was told so.

    That is torch.backends.cuda.matmul.fp32_precision = "tf32" (or the older allow_tf32).
    """
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, added up in fp32. a [m, k] and b [k, n] of one dtype."""
    if _SHIM:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, T: tl.constexpr):
    """x rounded to T, to nearest even."""
    if _SHIM and T == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(T)


@triton.jit
def product_tile(
    a,
    b,
    rows,
    columns,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N]: rows of a [M, K] times columns of b [K, N], 0 beyond M and N.

    Args:
        rows, columns: indices of the tile, int64: an offset times a stride may pass 2^31.
        EVEN_K: K is a multiple of BLOCK_K, so that the inner loop needs no mask along K.
    """
    k = tl.arange(0, BLOCK_K)
    at = a + rows[:, None] * stride_am + k[None, :] * stride_ak
    bt = b + k[:, None] * stride_bk + columns[None, :] * stride_bn
    row_there = (rows < M)[:, None]
    column_there = (columns < N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(at, mask=row_there, other=0.0)
            y = tl.load(bt, mask=column_there, other=0.0)
        else:
            left = K - start
            x = tl.load(at, mask=row_there & (k < left)[None, :], other=0.0)
            y = tl.load(bt, mask=column_there & (k < left)[:, None], other=0.0)
        acc = dot(x, y, acc, PRECISION)
        at += BLOCK_K * stride_ak
        bt += BLOCK_K * stride_bk
    return acc


@triton.jit
def tile_order(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of the tile-th tile: GROUP_M rows of tiles at a time, so that the tiles that
    run together share rows of a and columns of b in the L2 cache."""
    group = tile // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    inside = tile % (GROUP_M * tiles_n)
    return first + inside % height, inside // height

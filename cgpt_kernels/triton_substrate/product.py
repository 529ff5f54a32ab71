"""Tiles of a matrix product, their order, and the plain product that several backwards need."""

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .device import dot, narrow, precision


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


@triton.jit
def product_kernel(
    a, b, out, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    ADD: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out [M, N] = a [M, K] b [K, N], or what stands there plus it; out contiguous."""
    tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    value = product_tile(
        a, b, rows, columns, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    there = (rows < M)[:, None] & (columns < N)[None, :]
    at = out + rows[:, None] * N + columns[None, :]
    if ADD:
        value += tl.load(at, mask=there, other=0.0)
    tl.store(at, narrow(value, out.dtype.element_ty), mask=there)


# ---- launch -------------------------------------------------------------------------------------

# Tiles of 128 x 128 below which processors would have none: an H100 has 132, an A100 108.
_FEW_TILES = 132


def shape_class(M: int, N: int, itemsize: int, epilogue: bool) -> str:
    """The class of shapes that share a launch configuration."""
    if M <= 16:
        return "16 bit, M <= 16" if itemsize == 2 else "fp32, M <= 16"
    if itemsize == 4:
        return "fp32, M > 16"
    tiles = ((M + 127) // 128) * ((N + 127) // 128)
    if tiles < _FEW_TILES:
        return "16 bit, few tiles"
    return "16 bit, many tiles, epilogue" if epilogue else "16 bit, many tiles"


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b.

    Args:
        a: [M, K], b: [K, N], of one dtype and any strides.   out: [M, N], contiguous; fp32 for add.
    """
    (M, K), N = a.shape, b.shape[1]
    chosen = launch.config("gemm", shape_class(M, N, a.element_size(), add), a.device.index)
    tiles = launch.cdiv(M, chosen["BLOCK_M"]) * launch.cdiv(N, chosen["BLOCK_N"])
    even = K % chosen["BLOCK_K"] == 0
    numbers = M, N, K, *a.stride(), *b.stride(), add, precision(a.dtype), even
    launch.run(product_kernel, (tiles,), (a, b, out), numbers, chosen)

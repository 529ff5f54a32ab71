"""gemm in Triton: tiles of the product with the whole epilogue, and a backward of three products.

Forward: a program adds up one BLOCK_M x BLOCK_N tile in fp32, applies bias, activation and residual
to it and writes it once; (M * K + N * K + M * N) * sizeof(T) bytes at best. For a backward it also
writes the values before the activation, rounded to T, and applies the activation to those.
Backward: one pass over dy and those values gives g = dy * activation'(pre) and, in shares that are
added up in a fixed order, dbias = sum(g); then dx = g W and dW = g^T x by the kernel of the
forward, which takes any strides, so that nothing is transposed or copied.

Letters: M rows, N output width, K reduced width, T dtype of x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_substrate import launch
from ...triton_substrate.device import narrow, precision
from ...triton_substrate.product import product_tile, shape_class, tile_order
from ...triton_substrate.shares import add_shares
from ..dispatch import as_rows

_GELU_SLOPE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_GELU_CUBIC = tl.constexpr(0.044715)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)  # hands NaN on
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), which keeps its digits where tanh(u) is near -1
        u = _GELU_SLOPE * (x + _GELU_CUBIC * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * u))
    return x


@triton.jit
def _activation_grad(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * _SQRT_HALF)) + x * _INV_SQRT_2PI * tl.exp(-0.5 * x * x)
    u = _GELU_SLOPE * (x + _GELU_CUBIC * x * x * x)
    s = 1.0 / (1.0 + tl.exp(-2.0 * u))
    return s + x * s * (1.0 - s) * 2.0 * _GELU_SLOPE * (1.0 + 3.0 * _GELU_CUBIC * x * x)


@triton.jit
def gemm_kernel(
    x, weight, bias, residual, y, pre,
    M, N, K, stride_xm, stride_xk, stride_wk, stride_wn, stride_rm,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_PRE: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y [M, N] = activation(x [M, K] weight [K, N] + bias) + residual; y and pre contiguous."""
    tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = product_tile(
        x, weight, rows, columns, M, N, K, stride_xm, stride_xk, stride_wk, stride_wn,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    there = (rows < M)[:, None] & (columns < N)[None, :]
    at = rows[:, None] * N + columns[None, :]
    if HAS_BIAS:
        out += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if HAS_PRE:
        kept = narrow(out, pre.dtype.element_ty)
        tl.store(pre + at, kept, mask=there)
        out = kept.to(tl.float32)
    out = _activate(out, ACTIVATION)
    if HAS_RESIDUAL:
        added = residual + rows[:, None] * stride_rm + columns[None, :]
        out += tl.load(added, mask=there, other=0.0).to(tl.float32)
    tl.store(y + at, narrow(out, y.dtype.element_ty), mask=there)


@triton.jit
def gemm_activation_bwd_kernel(
    dy, pre, g, shares, M, N, stride_dm,
    ACTIVATION: tl.constexpr, NEED_BIAS: tl.constexpr,
    ROWS_EACH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """g = dy * activation'(pre) in T; row `program` of shares, [programs, N], its sum over rows."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    program = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, ROWS_EACH, BLOCK_M):
        rows = program * ROWS_EACH + start + tl.arange(0, BLOCK_M)
        there = (rows < M)[:, None] & (columns < N)[None, :]
        value = tl.load(dy + rows[:, None] * stride_dm + columns[None, :], mask=there, other=0.0)
        if ACTIVATION != "none":
            at = rows[:, None] * N + columns[None, :]
            before = tl.load(pre + at, mask=there, other=0.0).to(tl.float32)
            slope = _activation_grad(before, ACTIVATION)
            value = narrow(value.to(tl.float32) * slope, g.dtype.element_ty)
            tl.store(g + at, value, mask=there)
        if NEED_BIAS:
            total += value.to(tl.float32)
    if NEED_BIAS:
        tl.store(shares + program * N + columns, tl.sum(total, 0), mask=columns < N)


# ---- launch -------------------------------------------------------------------------------------


def _product(a, b, bias, residual, y, pre, activation):
    """y = activation(a [M, K] b [K, N] + bias) + residual, a and b of any strides."""
    (M, K), N = a.shape, b.shape[1]
    if M == 0 or N == 0:
        return
    epilogue = bias is not None or residual is not None or activation != "none"
    which = shape_class(M, N, a.element_size(), epilogue)
    chosen = launch.config("gemm", which, a.device.index)
    tiles = launch.cdiv(M, chosen["BLOCK_M"]) * launch.cdiv(N, chosen["BLOCK_N"])
    numbers = (
        M, N, K, *a.stride(), *b.stride(), 0 if residual is None else residual.stride(0),
        activation, bias is not None, residual is not None, pre is not None,
        precision(a.dtype), K % chosen["BLOCK_K"] == 0,
    )  # fmt: skip
    launch.run(gemm_kernel, (tiles,), (a, b, bias, residual, y, pre), numbers, chosen)


def gemm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    activation: str,
    weight_kn: bool,
) -> None:
    """y = activation(x W^T + bias) + residual.

    Args:
        x: [..., K] in T, last stride 1.   weight: [N, K], or [K, N] where weight_kn.
        bias: [N], T or fp32.   residual, y: [..., N] in T; y contiguous.
        activation: "none", "gelu", "gelu_tanh" or "relu".
    """
    residual = residual if residual is None else as_rows(residual)
    _product(as_rows(x), weight if weight_kn else weight.t(), bias, residual, y, None, activation)


def gemm_fwd_with_pre(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    weight_layout: str,
) -> tuple[Tensor, Tensor]:
    """y and the values before the activation, both [M, N] in T. x and residual: [M, ...]."""
    b = weight if weight_layout == "kn" else weight.t()
    y = x.new_empty(x.shape[0], b.shape[1])
    pre = torch.empty_like(y)
    _product(x, b, bias, residual, y, pre, activation)
    return y, pre


def gemm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    activation: str | None,
    weight_layout: str,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias; an empty tensor for each that `need` does not ask for.

    Args:
        dy: [..., N] in T.   x: [..., K].   weight: [N, K] or [K, N] by weight_layout.
        pre: [M, N], x W^T + bias; empty where there is no activation.
    """
    dy, rows = as_rows(dy), as_rows(x)
    (M, N), kn = dy.shape, weight_layout == "kn"
    need_bias = bias is not None and need[2]
    g, dbias = dy, weight.new_empty(0)
    if activation is not None:
        g = torch.empty_like(pre)
    if need_bias:
        dbias = torch.empty(N, dtype=bias.dtype, device=bias.device)
    if (activation is not None or need_bias) and dy.numel():
        chosen = launch.config("gemm_activation_bwd", "any", x.device.index)
        programs = launch.cdiv(M, chosen["ROWS_EACH"])
        shares = x.new_empty((programs, N), dtype=torch.float32) if need_bias else None
        grid = launch.cdiv(N, chosen["BLOCK_N"]), programs
        numbers = M, N, dy.stride(0), activation or "none", need_bias
        launch.run(gemm_activation_bwd_kernel, grid, (dy, pre, g, shares), numbers, chosen)
        if need_bias:
            add_shares(shares, dbias)
    elif need_bias:
        dbias.zero_()
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if need[0]:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        _product(g, weight.t() if kn else weight, None, None, dx, None, "none")
    if need[1]:
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        a, b = (rows.t(), g) if kn else (g.t(), rows)
        _product(a, b, None, None, dweight, None, "none")
    return dx, dweight, dbias

"""LayerNorm in Triton: forward with an optional residual sum, backward with fixed order of sums.

Forward: a program holds BLOCK_R whole rows in registers, so x is read once and y written once:
2 * rows * C * sizeof(T) bytes (4 with the sum). Mean first, then the variance around it.
Backward: PROGRAMS programs each walk through a contiguous range of rows, write dx and keep their
share of dweight and dbias in registers; a second kernel adds the shares up in the order of the
programs. No atomics: the same bits on every run. Reads dy and x, writes dx: 3 * rows * C *
sizeof(T) bytes.

Letters: C width, T dtype of x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_substrate import launch
from ...triton_substrate.device import narrow
from ...triton_substrate.shares import add_shares
from ..dispatch import as_rows, dense_last

# A row lies in the registers of one program; a wider one would spill in the backward, which holds
# six arrays of its length.
WIDEST = 8192


@triton.jit
def layer_norm_fwd_kernel(
    x, residual, weight, bias, y, total, mean, rstd,
    rows, C, stride_x, stride_residual, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATISTICS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    there = (r < rows)[:, None] & (c < C)[None, :]
    s = tl.load(x + r[:, None] * stride_x + c[None, :], mask=there, other=0.0)
    if HAS_RESIDUAL:
        added = tl.load(residual + r[:, None] * stride_residual + c[None, :], mask=there, other=0.0)
        # rounded to T before it is normalised, as the sum that is handed on
        s = narrow(s.to(tl.float32) + added.to(tl.float32), total.dtype.element_ty)
        tl.store(total + r[:, None] * C + c[None, :], s, mask=there)
    wide = s.to(tl.float32)
    mu = tl.sum(wide, 1) / C  # [BLOCK_R]
    centred = tl.where(there, wide - mu[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    if HAS_STATISTICS:
        tl.store(mean + r, mu, mask=r < rows)
        tl.store(rstd + r, scale, mask=r < rows)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    out = centred * scale[:, None] * w[None, :]
    if HAS_BIAS:
        out += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y + r[:, None] * C + c[None, :], narrow(out, y.dtype.element_ty), mask=there)


@triton.jit
def layer_norm_bwd_kernel(
    dy, dtotal, x, weight, mean, rstd, dx, dweight, dbias,
    rows, C, rows_each, stride_dy, stride_dtotal, stride_x,
    HAS_DTOTAL: tl.constexpr, NEED_X: tl.constexpr, NEED_PARAMETERS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, and row `program` of the shares dweight and dbias, [programs, C] fp32."""
    program = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    db = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, rows_each, BLOCK_R):
        within = start + tl.arange(0, BLOCK_R)
        r = program.to(tl.int64) * rows_each + within
        row_there = (r < rows) & (within < rows_each)
        there = row_there[:, None] & (c < C)[None, :]
        g = tl.load(dy + r[:, None] * stride_dy + c[None, :], mask=there, other=0.0)
        g = g.to(tl.float32)
        value = tl.load(x + r[:, None] * stride_x + c[None, :], mask=there, other=0.0)
        mu = tl.load(mean + r, mask=row_there, other=0.0)
        scale = tl.load(rstd + r, mask=row_there, other=0.0)
        xhat = tl.where(there, (value.to(tl.float32) - mu[:, None]) * scale[:, None], 0.0)
        if NEED_PARAMETERS:
            dw += g * xhat
            db += g
        if NEED_X:
            g = g * w[None, :]
            of_mean = tl.sum(g, 1) / C
            of_scale = tl.sum(g * xhat, 1) / C
            d = (g - of_mean[:, None] - xhat * of_scale[:, None]) * scale[:, None]
            if HAS_DTOTAL:
                also = tl.load(
                    dtotal + r[:, None] * stride_dtotal + c[None, :], mask=there, other=0.0
                )
                d += also.to(tl.float32)
            tl.store(dx + r[:, None] * C + c[None, :], narrow(d, dx.dtype.element_ty), mask=there)
    if NEED_PARAMETERS:
        share = program.to(tl.int64) * C + c
        tl.store(dweight + share, tl.sum(dw, 0), mask=c < C)
        tl.store(dbias + share, tl.sum(db, 0), mask=c < C)


# ---- launch -------------------------------------------------------------------------------------


def shape_class(C: int) -> str:
    """The class of widths that share a launch configuration."""
    return next(f"C <= {limit}" for limit in (256, 1024, 2048, 4096, WIDEST) if C <= limit)


def _config(kernel: str, C: int, x: Tensor) -> dict[str, int]:
    chosen = launch.config(f"layer_norm_{kernel}", shape_class(C), x.device.index)
    return {"BLOCK_C": triton.next_power_of_2(C)} | chosen


def unsupported(x: Tensor, *rest) -> str | None:
    """Why these kernels cannot take x, or None."""
    C = x.shape[-1] if x.ndim else 0
    return f"rows are wider than {WIDEST}, got {C}" if C > WIDEST else None


def layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
) -> None:
    """y = LN(x), or total = x + residual and y = LN(total); mean and rstd where given.

    Args:
        x, residual, y, total: [..., C] in T, last stride 1; y and total contiguous.
        weight, bias: [C], T or fp32.   mean, rstd: [rows], fp32, or both None.
    """
    C = int(x.shape[-1])  # a traced size too becomes a constant of the kernel
    if y.numel() == 0:
        return
    x = as_rows(x)
    rows, stride_residual = x.shape[0], 0
    if residual is not None:
        residual = as_rows(residual)
        stride_residual = residual.stride(0)
    chosen = _config("fwd", C, x)
    tensors = x, residual, weight, bias, y, total, mean, rstd
    numbers = (
        rows, C, x.stride(0), stride_residual, float(eps),
        residual is not None, bias is not None, mean is not None,
    )  # fmt: skip
    programs = launch.cdiv(rows, chosen["BLOCK_R"])
    launch.run(layer_norm_fwd_kernel, (programs,), tensors, numbers, chosen)


def layer_norm_bwd(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (with dtotal added, where given), dweight, dbias; empty where `need` says no.

    Args:
        dy, dtotal, x: [..., C] in T.   weight, bias: [C], T or fp32.   mean, rstd: [rows], fp32.
    """
    rows, C = mean.shape[0], int(x.shape[-1])
    need_bias = need[2] and bias is not None
    need_parameters = need[1] or need_bias
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need[0] else x.new_empty(0)
    empty = dy.numel() == 0
    allocate = torch.zeros if empty else torch.empty
    dweight = allocate(C if need_parameters else 0, dtype=weight.dtype, device=x.device)
    dbias = weight.new_empty(0)
    if need_bias:
        dbias = allocate(C, dtype=bias.dtype, device=x.device)
    if empty or not (need[0] or need_parameters):
        return dx, dweight if need[1] else weight.new_empty(0), dbias
    dy, x, weight = as_rows(dy), as_rows(x), dense_last(weight)
    stride_dtotal = 0
    if dtotal is not None:
        dtotal = as_rows(dtotal)
        stride_dtotal = dtotal.stride(0)
    chosen = _config("bwd", C, x)
    most, block_r = chosen.pop("PROGRAMS"), chosen["BLOCK_R"]
    rows_each = launch.cdiv(launch.cdiv(rows, most), block_r) * block_r
    programs = launch.cdiv(rows, rows_each)
    # two arrays, not one of twice the size: traced, what writes a view of an array copies it
    shape = (programs, C) if need_parameters else 0
    for_weight, for_bias = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    tensors = dy, dtotal, x, weight, mean, rstd, dx, for_weight, for_bias
    numbers = (
        rows, C, rows_each, dy.stride(0), stride_dtotal, x.stride(0),
        dtotal is not None, need[0], need_parameters,
    )  # fmt: skip
    launch.run(layer_norm_bwd_kernel, (programs,), tensors, numbers, chosen)
    if need_parameters:
        add_shares(for_weight, dweight, *((for_bias, dbias) if need_bias else ()))
    return dx, dweight if need[1] else weight.new_empty(0), dbias

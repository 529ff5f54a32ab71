"""linear_cross_entropy in Triton: logits live in registers, a tile at a time.

Forward: a program takes BLOCK_M rows and V_EACH columns of the vocabulary and keeps a running
maximum, sum of exponentials, the target's logit and the sum of logits; a second kernel joins the
parts of a row in their order. It reads x and the weight, and writes four numbers per row and part.
Backward: rows in slabs. One kernel makes the logits of a slab again and writes
g = drows * (softmax - target) in T, at most SLAB_BYTES; two products take dx = g W and
dW += g^T x, the sum over slabs in fp32. 8 * M * V * K operations in all, a third more than with
stored logits, and no M x V matrix.

Letters: M rows, K width, V vocabulary, T dtype of x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_substrate import launch
from ...triton_substrate.device import narrow, precision
from ...triton_substrate.product import product, product_tile
from ...triton_substrate.shares import add_shares
from ..dispatch import as_rows, dense_last

# g of one slab: 640 rows at V = 50257 in 16 bit, enough for full tiles in every product, and about
# one L2 cache of an H100 (50 MB), so that the products find most of it there.
SLAB_BYTES = 1 << 26
# Rows of g start at multiples of 128 bytes whatever V is: loads of 16 bytes need that.
_ALIGN = 64


@triton.jit
def linear_cross_entropy_fwd_kernel(
    x, weight, bias, target, parts, M, K, V, stride_xm, stride_wv,
    HAS_BIAS: tl.constexpr, SMOOTH: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    V_EACH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts [4, parts, M], fp32: maximum, sum of exp(logit - maximum), target's logit, sum."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < M
    wanted = tl.load(target + rows, mask=there, other=-1)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    hit = tl.zeros([BLOCK_M], tl.float32)
    every = tl.zeros([BLOCK_M], tl.float32)
    part = tl.program_id(1)
    first = part * V_EACH
    for start in range(first, min(first + V_EACH, V), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N).to(tl.int64)
        logits = product_tile(
            x, weight, rows, columns, M, V, K, stride_xm, 1, 1, stride_wv,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
        known = columns < V
        if HAS_BIAS:
            logits += tl.load(bias + columns, mask=known, other=0.0).to(tl.float32)[None, :]
        hit += tl.sum(tl.where(columns[None, :] == wanted[:, None], logits, 0.0), 1)
        if SMOOTH:
            every += tl.sum(tl.where(known[None, :], logits, 0.0), 1)
        logits = tl.where(known[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
    at = part.to(tl.int64) * M + rows
    step = tl.num_programs(1).to(tl.int64) * M
    tl.store(parts + at, top, mask=there)
    tl.store(parts + at + step, total, mask=there)
    tl.store(parts + at + 2 * step, hit, mask=there)
    if SMOOTH:
        tl.store(parts + at + 3 * step, every, mask=there)


@triton.jit
def linear_cross_entropy_join_kernel(
    parts, target, loss, lse, M, V, count, step, ignore_index, smoothing,
    SMOOTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """loss and lse of each row; NaN for a target that is no class and not ignored.

    step: count * M, from one of the four numbers of a part to the next.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < M
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    hit = tl.zeros([BLOCK_M], tl.float32)
    every = tl.zeros([BLOCK_M], tl.float32)
    for part in range(0, count):
        at = parts + part * M + rows
        own = tl.load(at, mask=there, other=0.0)
        higher = tl.maximum(top, own)
        added = tl.load(at + step, mask=there, other=0.0) * tl.exp(own - higher)
        total = total * tl.exp(top - higher) + added
        top = higher
        hit += tl.load(at + 2 * step, mask=there, other=0.0)
        if SMOOTH:
            every += tl.load(at + 3 * step, mask=there, other=0.0)
    sums = top + tl.log(total)
    value = sums - hit
    if SMOOTH:
        value = (1.0 - smoothing) * value + smoothing * (sums - every / V)
    wanted = tl.load(target + rows, mask=there, other=0)
    value = tl.where((wanted >= 0) & (wanted < V), value, float("nan"))
    tl.store(loss + rows, tl.where(wanted == ignore_index, 0.0, value), mask=there)
    tl.store(lse + rows, sums, mask=there)


@triton.jit
def linear_cross_entropy_bwd_kernel(
    x, weight, bias, target, lse, drows, g, shares, M, K, V, stride_xm, stride_wv, stride_gm,
    ignore_index, smoothing,
    HAS_BIAS: tl.constexpr, NEED_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """g [M, V] in T; shares [blocks of rows, V], fp32, its sums over each block of rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = product_tile(
        x, weight, rows, columns, M, V, K, stride_xm, 1, 1, stride_wv,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    there, known = rows < M, columns < V
    if HAS_BIAS:
        logits += tl.load(bias + columns, mask=known, other=0.0).to(tl.float32)[None, :]
    sums = tl.load(lse + rows, mask=there, other=0.0)
    wanted = tl.load(target + rows, mask=there, other=-1)
    weighed = tl.load(drows + rows, mask=there, other=0.0).to(tl.float32)
    weighed = tl.where(wanted == ignore_index, 0.0, weighed)
    is_target = columns[None, :] == wanted[:, None]
    value = tl.exp(logits - sums[:, None]) - tl.where(is_target, 1.0 - smoothing, 0.0)
    value = (value - smoothing / V) * weighed[:, None]
    both = there[:, None] & known[None, :]
    at = g + rows[:, None] * stride_gm + columns[None, :]
    tl.store(at, narrow(value, g.dtype.element_ty), mask=both)
    if NEED_BIAS:
        column_sums = tl.sum(tl.where(both, value, 0.0), 0)
        tl.store(shares + tl.program_id(0).to(tl.int64) * V + columns, column_sums, mask=known)


# ---- launch -------------------------------------------------------------------------------------


def _config(kernel: str, x: Tensor) -> dict[str, int]:
    which = "16 bit" if x.element_size() == 2 else "fp32"
    return dict(launch.config(f"linear_cross_entropy_{kernel}", which, x.device.index))


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    loss: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """loss of each row and its lse.

    Args:
        x: [..., K], weight: [V, K], both in T with last stride 1.   bias: [V], T or fp32.
        target: [...], int64, contiguous.   loss, lse: [M], fp32; loss is 0 where ignored.
    """
    (V, K), M = weight.shape, target.numel()
    if M == 0:
        return
    x, smooth = as_rows(x), label_smoothing > 0.0
    chosen = _config("fwd", x)
    count = launch.cdiv(V, chosen["V_EACH"])
    parts = x.new_empty((4, count, M), dtype=torch.float32)
    numbers = (
        M, K, V, x.stride(0), weight.stride(0),
        bias is not None, smooth, precision(x.dtype), K % chosen["BLOCK_K"] == 0,
    )  # fmt: skip
    grid, tensors = (launch.cdiv(M, chosen["BLOCK_M"]), count), (x, weight, bias, target, parts)
    launch.run(linear_cross_entropy_fwd_kernel, grid, tensors, numbers, chosen)
    chosen = launch.config("linear_cross_entropy_join", "any", x.device.index)
    numbers = M, V, count, count * M, ignore_index, float(label_smoothing), smooth
    grid, tensors = (launch.cdiv(M, chosen["BLOCK_M"]),), (parts, target, loss, lse)
    launch.run(linear_cross_entropy_join_kernel, grid, tensors, numbers, chosen)


def linear_cross_entropy_bwd(
    drows: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias; an empty tensor for each that `need` does not ask for.

    Args:
        drows: [M], fp32: gradient of each row's loss.
        x: [M, K] in T.   weight: [V, K].   target: [M], int64.   bias: [V], T or fp32.
        lse: [M], fp32, of the forward.
    """
    (M, K), V = x.shape, weight.shape[0]
    need_bias = need[2] and bias is not None
    dx = x.new_empty((M, K) if need[0] else 0)
    dweight = weight.new_empty((V, K) if need[1] else 0)
    dbias = torch.empty(V, dtype=bias.dtype, device=x.device) if need_bias else x.new_empty(0)
    if M == 0 or V == 0:
        return dx.zero_(), dweight.zero_(), dbias.zero_()
    x, weight = dense_last(x), dense_last(weight)
    drows, target = dense_last(drows), dense_last(target)
    bias = bias if bias is None else dense_last(bias)
    chosen = _config("bwd", x)
    block_m = chosen["BLOCK_M"]
    stride_g = launch.cdiv(V, _ALIGN) * _ALIGN
    step = max(1, SLAB_BYTES // (stride_g * x.element_size() * block_m)) * block_m
    # how many slabs there are is a constant of a traced graph, M need not be one
    slabs = int(launch.cdiv(M, step))
    g = x.new_empty(M if slabs == 1 else step, stride_g)
    shares = None
    if need_bias:
        shares = x.new_empty((launch.cdiv(M, block_m), V), dtype=torch.float32)
    total = dweight
    if need[1] and slabs > 1 and x.dtype != torch.float32:
        total = torch.empty((V, K), dtype=torch.float32, device=x.device)
    for slab in range(slabs):
        rows = slice(slab * step, M if slab + 1 == slabs else (slab + 1) * step)
        count = rows.stop - rows.start

        def part(tensor, rows=rows):  # the whole of it as it is: traced, a view would be copied
            return tensor[rows] if slabs > 1 else tensor

        numbers = (
            count, K, V, x.stride(0), weight.stride(0), stride_g, ignore_index,
            float(label_smoothing), bias is not None, need_bias, precision(x.dtype),
            K % chosen["BLOCK_K"] == 0,
        )  # fmt: skip
        tensors = (
            part(x), weight, bias, part(target), part(lse), part(drows), g,
            shares[slab * (step // block_m) :] if need_bias and slab else shares,
        )  # fmt: skip
        grid = launch.cdiv(count, block_m), launch.cdiv(V, chosen["BLOCK_N"])
        launch.run(linear_cross_entropy_bwd_kernel, grid, tensors, numbers, chosen)
        logits = g[:count, :V]
        if need[0]:
            product(logits, weight, part(dx))
        if need[1]:
            product(logits.t(), part(x), total, add=slab > 0)
    if total is not dweight:
        dweight.copy_(total)
    if need_bias:
        add_shares(shares, dbias)
    return dx, dweight, dbias

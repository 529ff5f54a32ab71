"""Memory for the CUDA kernels of linear_cross_entropy, and the products of its backward.

Letters: M rows, K width, V vocabulary, T the dtype of x.
"""

import torch
from torch import Tensor

from ... import backends
from ..dispatch import dense_last

# Gradients of the logits held at once, [rows, V] in T: 1335 rows of bf16 at V = 50257, so that the
# products of them have enough rows while the peak stays far below the full M x V matrix.
SLAB_BYTES = 1 << 27
ROWS, ALIGN = 128, 16  # rows of a kernel's tile; bytes that rows of g start on multiples of


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    loss: Tensor,
    lse: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """loss of each row and its lse; 0 where ignored, NaN where the target names no class.

    Args:
        x: [..., K], weight: [V, K], both in T with last stride 1.   bias: [V], T or fp32.
        target: [...], int64.   loss, lse: [M], fp32.
    """
    kernels = backends.cuda_kernels()
    parts = loss.new_empty(kernels.linear_cross_entropy_parts_cuda(weight.shape[0]), loss.numel())
    kernels.linear_cross_entropy_fwd_cuda(
        x, weight, bias, target, loss, lse, ignore_index, label_smoothing, parts
    )


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

    g = d loss / d logits comes from the kernel, a slab of rows at a time; dx = g W and dW = g^T x
    are plain products, which torch's library runs.

    Args:
        drows: [M], fp32: gradient of each row's loss.
        x: [M, K] in T.   weight: [V, K].   target: [M], int64.   bias: [V], T or fp32.
        lse: [M], fp32, of the forward.
    """
    kernels, (M, K), V = backends.cuda_kernels(), x.shape, weight.shape[0]
    need_bias = need[2] and bias is not None
    dx = x.new_empty((M, K) if need[0] else 0)
    dweight = weight.new_empty((V, K) if need[1] else 0)
    dbias = bias.new_empty(V) if need_bias else weight.new_empty(0)
    if M == 0 or V == 0:
        return dx.zero_(), dweight.zero_(), dbias.zero_()
    x, weight = dense_last(x), dense_last(weight)
    drows, target = dense_last(drows), dense_last(target)
    bias = bias if bias is None else dense_last(bias)
    stride = -(-V * x.element_size() // ALIGN) * ALIGN // x.element_size()
    step = max(1, SLAB_BYTES // (stride * x.element_size() * ROWS)) * ROWS
    g = x.new_empty(min(step, M), stride)
    g[:, V:] = 0  # oneDNN's bf16 product on AMX multiplies what lies behind a row, where NaN counts
    shares = None
    if need_bias:
        shares = lse.new_empty(kernels.linear_cross_entropy_shares_cuda(M), V)
    total = dweight  # its sum over slabs is fp32 until the end
    if need[1] and M > step and x.dtype != torch.float32:
        total = lse.new_zeros(V, K)
    for start in range(0, M, step):
        rows = slice(start, min(start + step, M))
        slab = g[: rows.stop - start, :V]
        of_rows = None
        if need_bias:
            of_rows = shares[start // ROWS :][
                : kernels.linear_cross_entropy_shares_cuda(rows.stop - start)
            ]
        kernels.linear_cross_entropy_logit_gradient_cuda(
            drows[rows], x[rows], weight, bias, target[rows], lse[rows], slab, of_rows,
            ignore_index, label_smoothing,
        )  # fmt: skip
        if need[0]:
            torch.mm(slab, weight, out=dx[rows])
        if need[1]:
            if total is not dweight:
                total += slab.t() @ x[rows]
            elif start == 0:
                torch.mm(slab.t(), x[rows], out=total)
            else:
                total.addmm_(slab.t(), x[rows])
    if total is not dweight:
        dweight.copy_(total)
    if need_bias:
        kernels.linear_cross_entropy_dbias_cuda(shares, dbias)
    return dx, dweight, dbias

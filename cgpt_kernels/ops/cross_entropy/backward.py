"""Gradients of the linear cross-entropy, a slab of rows at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits of one slab in fp32: 64 MB keeps the peak far below the full M x V matrix while a slab
# still has hundreds of rows for the three products at V = 50257.
SLAB_ELEMENTS = 1 << 24


def linear_cross_entropy_bwd(
    drows: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias; an empty tensor for each that `need` does not ask for.

    g = drows * (softmax(logits) - (1 - s) * onehot(target) - s / V),  dx = g W,  dW = g^T x

    Args:
        drows: [M], fp32: gradient of each row's loss.
        x: [M, K] in T.   weight: [V, K].   target: [M], int64.   bias: [V], T or fp32.
    """
    (M, K), V = x.shape, weight.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    need_bias = need[2] and bias is not None
    dx = x.new_empty((M, K) if need[0] else 0)
    dweight = None  # [V, K]; its sum over slabs stays in fp32 until the end
    dbias = weight.new_zeros(V if need_bias else 0, dtype=wide)
    counts = target != ignore_index
    drows = torch.where(counts, drows, 0.0)
    index = torch.where(counts, target, 0)  # any column: its row is multiplied by 0
    step = max(1, SLAB_ELEMENTS // max(V, 1))
    for start in range(0, M, step):
        rows = slice(start, start + step)
        same = bias is None or bias.dtype == x.dtype
        logits = F.linear(x[rows], weight, bias if same else None).to(wide)  # [rows, V]
        if not same:
            logits += bias
        # Normalised again from these logits instead of exp(logits - lse): in bf16 the rounding of
        # the top logit then cancels, and each row of g sums to 0.
        g = torch.softmax(logits, -1)
        if label_smoothing > 0.0:
            g -= label_smoothing / V
        at = index[rows, None]
        g.scatter_add_(-1, at, torch.full_like(at, label_smoothing - 1.0, dtype=wide))
        g *= drows[rows, None]
        if need_bias:
            dbias += g.sum(0)
        g = g.to(x.dtype)
        if need[0]:
            torch.mm(g, weight, out=dx[rows])
        if need[1]:
            if dweight is None:
                dweight = g.t() @ x[rows]
                if start + step < M:
                    dweight = dweight.to(wide)
            elif wide == x.dtype:
                dweight.addmm_(g.t(), x[rows])
            else:
                dweight += g.t() @ x[rows]
    if dweight is None:
        dweight = weight.new_zeros((V, K) if need[1] else 0)
    if need_bias:
        dbias = dbias.to(bias.dtype)
    return dx, dweight.to(weight.dtype), dbias if need_bias else weight.new_empty(0)

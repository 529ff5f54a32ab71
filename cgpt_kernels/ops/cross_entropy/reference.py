"""Linear layer and cross-entropy in plain PyTorch: what every backend is held to."""

import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy_rows(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Loss of each row of logits = x W^T + bias against its target, 0 where target == ignore_index.

    (1 - s) * (lse - logits[target]) + s / V * sum_v (lse - logits[v]), s the label smoothing
    (Szegedy et al., arXiv 1512.00567, section 7).

    Args:
        x: [M, K], any floating dtype T; logits are taken in T, the loss in fp32 at least.
        weight: [V, K], T.   bias: [V], T or fp32.   target: [M], int64.
    Returns:
        [M], fp32 (fp64 for fp64 inputs).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if bias is None or bias.dtype == x.dtype:
        logits = F.linear(x, weight, bias).to(wide)
    else:
        logits = F.linear(x, weight).to(wide) + bias
    if logits.shape[0] == 0:  # F.cross_entropy refuses an empty vocabulary even without rows
        return logits.sum(-1)
    return F.cross_entropy(
        logits,
        target,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )


def reduce_rows(rows: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """mean over the rows that count (NaN where none does, as torch), their sum, or the rows.

    Added in fp64, so that the kernels' own reductions, in another order, round to the same bits.
    """
    if reduction == "none":
        return rows.view(target.shape)
    total = rows.sum(dtype=torch.float64)
    if reduction == "mean":
        total = total / (target != ignore_index).sum()
    return total.to(rows.dtype)

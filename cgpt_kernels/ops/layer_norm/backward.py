"""Gradients of LayerNorm from the saved mean and rstd."""

import torch
from torch import Tensor

from ... import backends
from ..dispatch import REFUSALS, as_rows, dense_last

_kernel = getattr(backends._C, "layer_norm_bwd", None)
_empty_like = torch.empty_like  # the look-up in torch's namespace costs 0.1 us a call


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
    """dx, dweight, dbias; an empty tensor for each that `need` does not ask for.

    xhat = (x - mean) * rstd,  g = dy * weight
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  dweight = sum(dy * xhat),  dbias = sum(dy)

    Args:
        dtotal: [..., C] in T, added to dx: the gradient of the sum that add_layer_norm hands on.
        dy, x: [..., C] in T.   weight, bias: [C], T or fp32.   mean, rstd: [rows], fp32.
    Returns:
        dx in T, dweight and dbias in the dtypes of weight and bias.
    """
    rows, C = mean.shape[0], x.shape[-1]
    if C == 1:  # xhat is 0, which ATen's rearranged formula misses by rstd * ulp(x)
        rstd = torch.zeros_like(rstd)
    # ATen's kernel is exact enough only when all it gets is fp32: with bf16 rows it rounds partial
    # sums of dweight to bf16.
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.reshape(rows, C).float(),
        x.reshape(rows, C).float(),
        (C,),
        mean[:, None],
        rstd[:, None],
        weight.float(),
        None if bias is None else bias.float(),
        (need[0], need[1], need[2] and bias is not None),
    )
    if need[0]:
        dx = dx.to(x.dtype).view(x.shape)
        if dtotal is not None:
            dx = dx + dtotal
    return (
        dx if need[0] else x.new_empty(0),
        dweight.to(weight.dtype) if need[1] else weight.new_empty(0),
        dbias.to(bias.dtype) if need[2] and bias is not None else weight.new_empty(0),
    )


def layer_norm_bwd_cpu(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """layer_norm_bwd by the CPU kernel; None for what `need` does not ask for."""
    dx = None
    if need[0]:
        dx = _empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)
    dweight = _empty_like(weight) if need[1] else None
    dbias = _empty_like(bias) if need[2] and bias is not None else None
    try:
        _kernel(dy, dtotal, x, weight, mean, rstd, dx, dweight, dbias)
    except REFUSALS:  # copies strides the kernel cannot read, or says why
        _kernel(
            as_rows(dy),
            None if dtotal is None else as_rows(dtotal),
            as_rows(x),
            dense_last(weight),
            mean,
            rstd,
            None if dx is None else as_rows(dx),
            dweight,
            dbias,
        )
    return dx, dweight, dbias

"""Memory for the CUDA backward of layer_norm (csrc/ops/layer_norm/layer_norm_bwd.cuh)."""

from torch import Tensor

from ... import backends
from ..dispatch import as_rows, dense_last


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

    Args and Returns: as layer_norm_bwd of backward.py.
    """
    kernels, rows, C = backends.cuda_kernels(), mean.shape[0], x.shape[-1]
    need_bias = need[2] and bias is not None
    dx = x.new_empty(x.shape) if need[0] else None
    dweight = weight.new_empty(C) if need[1] else None
    dbias = bias.new_empty(C) if need_bias else None
    shares = None
    if need[1] or need_bias:
        count = kernels.layer_norm_bwd_shares_cuda(rows)
        shares = mean.new_empty((2, count, C))
    kernels.layer_norm_bwd_cuda(
        as_rows(dy.reshape(rows, C)),
        None if dtotal is None else as_rows(dtotal.reshape(rows, C)),
        as_rows(x.reshape(rows, C)),
        dense_last(weight),
        mean,
        rstd,
        None if dx is None else dx.view(rows, C),
        dweight,
        dbias,
        shares,
    )
    nothing = weight.new_empty(0)
    return (
        x.new_empty(0) if dx is None else dx,
        nothing if dweight is None else dweight,
        nothing if dbias is None else dbias,
    )

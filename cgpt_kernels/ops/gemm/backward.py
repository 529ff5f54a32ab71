"""Gradients of dropout(activation(x W^T + bias)) + residual."""

import torch
from torch import Tensor

from ... import backends
from ..dispatch import as_rows, dense_last
from .reference import activation_grad, dropout

_kernel = getattr(backends._C, "gemm_bwd", None)


def gemm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    activation: str | None,
    weight_layout: str,
    dropout_p: float,
    seed: int | Tensor | None,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias; an empty tensor for each that `need` does not ask for.

    g = dropout(dy) * activation'(pre),  dx = g W,  dW = g^T x,  dbias = sum(g)

    Args:
        dy: [..., N] in T.   x: [..., K].   weight: [N, K] or [K, N] by weight_layout.
        pre: [M, N], x W^T + bias; empty where there is no activation.
        dropout_p, seed: the forward's.
    """
    K, M = x.shape[-1], x.shape[:-1].numel()
    dy = dy.reshape(M, dy.shape[-1])
    g = activation_grad(dropout(dy, dropout_p, seed), pre, activation)  # [M, N]
    dx, dweight, dbias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if need[0]:
        dx = (g @ (weight if weight_layout == "nk" else weight.t())).view(x.shape)
    if need[1]:
        rows = x.reshape(M, K)
        dweight = g.t() @ rows if weight_layout == "nk" else rows.t() @ g
    if bias is not None and need[2]:
        # sum() adds bf16 and fp16 in fp32; asking for the bias's dtype rounds once
        dbias = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)).to(bias.dtype)
    return dx, dweight, dbias


def gemm_bwd_cpu(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor | None,
    activation: str | None,
    weight_layout: str,
    dropout_p: float,
    seed: int | Tensor | None,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """gemm_bwd by the CPU kernel."""
    new = x.new_empty
    rows, dy = as_rows(x), as_rows(dy)
    if 1 not in weight.stride():
        weight = dense_last(weight)
    dx = new(x.shape) if need[0] else None
    dweight = new(weight.shape) if need[1] else None
    dbias = None if bias is None or not need[2] else bias.new_empty(bias.shape)
    g = None if activation is None and dropout_p == 0.0 else new(dy.shape)
    _kernel(
        dy,
        rows,
        weight,
        None if activation is None else pre,
        g,
        None if dx is None else dx.view(rows.shape),
        dweight,
        dbias,
        activation or "none",
        weight_layout == "kn",
        dropout_p,
        0 if seed is None else int(seed),
    )
    return tuple(new(0) if t is None else t for t in (dx, dweight, dbias))

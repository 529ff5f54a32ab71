"""Gradients of activation(x W^T + bias) + residual."""

import torch
from torch import Tensor

from .reference import activation_grad


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

    g = dy * activation'(pre),  dx = g W,  dW = g^T x,  dbias = sum(g)

    Args:
        dy: [..., N] in T.   x: [..., K].   weight: [N, K] or [K, N] by weight_layout.
        pre: [M, N], x W^T + bias; empty where there is no activation.
    """
    K, M = x.shape[-1], x.shape[:-1].numel()
    dy = dy.reshape(M, dy.shape[-1])
    g = activation_grad(dy, pre, activation)  # [M, N]
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

"""LayerNorm in plain PyTorch: what every backend is held to.

Ba, Kiros, Hinton, "Layer Normalization", arXiv 1607.06450, equations 3-4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension, var biased.

    Args:
        x: [..., C], any floating dtype T. Statistics are taken in fp32 at least.
        weight, bias: [C], T or fp32.
    Returns:
        [..., C] in T.
    """
    if weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    # F.layer_norm has no rule for every mix of x and parameter dtypes: widen, then round once.
    wide = torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias, eps).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """s = x + residual rounded to T; returns (layer_norm(s), s)."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total

"""Matrix product, bias, activation, residual in plain PyTorch: what every backend is held to."""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
LAYOUTS = ("nk", "kn")


def activate(y: Tensor, activation: str | None) -> Tensor:
    """gelu: x * Phi(x) by erf; gelu_tanh: its tanh form (Hendrycks, Gimpel, arXiv 1606.08415)."""
    if activation is None:
        return y
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    return F.relu(y)


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    weight_layout: str,
) -> Tensor:
    """activation(x W^T + bias) + residual.

    Args:
        x: [..., K], any floating dtype T.
        weight: [N, K] ("nk", as nn.Linear) or [K, N] ("kn", as GPT-2's Conv1D), T.
        bias: [N], T or fp32.
        residual: [..., N], T.
    Returns:
        [..., N] in T.
    """
    w = weight if weight_layout == "nk" else weight.t()  # [N, K]
    if bias is None or bias.dtype == x.dtype:
        y = F.linear(x, w, bias)
    else:  # fp32 bias beside a low-precision product
        y = (F.linear(x, w).to(bias.dtype) + bias).to(x.dtype)
    y = activate(y, activation)
    return y if residual is None else y + residual


def activation_grad(dy: Tensor, pre: Tensor, activation: str | None) -> Tensor:
    """dy * activation'(pre), in the dtype of dy."""
    if activation is None:
        return dy
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, pre, 0)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(dy, pre, approximate=approximate)

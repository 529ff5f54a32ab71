"""Product, bias, activation, dropout, residual in plain PyTorch: what every backend is held to."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..philox import keep_mask

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
    lora: tuple | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """dropout(activation(x W^T + bias)) + residual, with lora scale (x' A^T) B^T in the product.

    Args:
        x: [..., K], any floating dtype T.
        weight: [N, K] ("nk", as nn.Linear) or [K, N] ("kn", as GPT-2's Conv1D), T.
        bias: [N], T or fp32.
        residual: [..., N], T.
        lora: (A [r, K], B [N, r], scale, x' [..., K] or None for x), A and B in T or fp32.
        dropout_p, seed: of `dropout`; seed None with dropout_p 0 only.
    Returns:
        [..., N] in T.
    """
    w = weight if weight_layout == "nk" else weight.t()  # [N, K]
    if bias is None or bias.dtype == x.dtype:
        y = F.linear(x, w, bias)
    else:  # fp32 bias beside a low-precision product
        y = (F.linear(x, w).to(bias.dtype) + bias).to(x.dtype)
    if lora is not None:
        A, B, scale, x_low = lora
        low = F.linear(F.linear((x if x_low is None else x_low).to(A.dtype), A), B)
        y = (y + low * scale).to(x.dtype)
    y = dropout(activate(y, activation), dropout_p, seed)
    return y if residual is None else y + residual


def dropout(y: Tensor, dropout_p: float, seed: int | Tensor | None) -> Tensor:
    """y where the shared mask keeps it, times 1 / (1 - dropout_p), else 0; its own gradient too.

    Element e of y [..., N], counted in order, is element e of the mask.
    """
    if dropout_p == 0.0:
        return y
    keep = keep_mask(0, y.numel(), dropout_p, seed, y.device).view(y.shape)
    return y * keep / (1.0 - dropout_p)


PANEL = 32  # columns that lie together in a packed weight


def unpack(data: Tensor, format: str, N: int, K: int, group: int | None) -> Tensor:
    """The packed weight as fp32 [N, K]: what the layout of csrc/ops/gemm/packed.h means.

    Args:
        data: uint8, panels of 32 columns one after the other, zero padded.
        format: "f32", "bf16", "f16", "int8" or "int4".
        group: values along K that share a scale, "int4" only.
    """
    panels = -(-N // PANEL)
    if data.numel() == 0:
        return data.new_zeros(N, K, dtype=torch.float32)
    data = data.view(panels, -1)
    if format == "f32":
        w = data.view(torch.float32).view(panels, K, PANEL).transpose(1, 2)
    elif format in ("bf16", "f16"):
        pairs = data.view(torch.bfloat16 if format == "bf16" else torch.float16)
        w = pairs.view(panels, -1, PANEL, 2).transpose(1, 2).float()
    elif format == "int8":
        end = data.shape[1] - 8 * PANEL  # behind the weights: 32 scales, 32 column sums
        quads = data[:, :end].view(torch.int8).view(panels, -1, PANEL, 4)
        scale = data[:, end : end + 4 * PANEL].contiguous().view(torch.float32)
        w = quads.transpose(1, 2).float() * scale.view(panels, PANEL, 1, 1)
    else:
        groups = -(-K // group)
        data = data.view(panels, groups, -1)
        end = data.shape[2] - 2 * PANEL  # behind each group: 32 scales
        bytes_ = data[..., :end].view(panels, groups, group // 8, PANEL, 4)
        nibbles = torch.stack((bytes_ & 15, bytes_ >> 4), 4)  # k, then k + 4
        q = nibbles.permute(0, 3, 1, 2, 4, 5).float() - 8  # [panels, 32, groups, group / 8, 2, 4]
        scale = data[..., end:].contiguous().view(torch.bfloat16).float().transpose(1, 2)
        w = q * scale[..., None, None, None]
    return w.reshape(panels * PANEL, -1)[:N, :K].contiguous()


def activation_grad(dy: Tensor, pre: Tensor, activation: str | None) -> Tensor:
    """dy * activation'(pre), in the dtype of dy."""
    if activation is None:
        return dy
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, pre, 0)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(dy, pre, approximate=approximate)

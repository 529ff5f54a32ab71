"""Memory and strides for the CUDA gemm beside its plain forward (csrc/ops/gemm/gemm_cuda.cu)."""

import torch
from torch import Tensor

from ... import backends, checks
from ..dispatch import as_rows


def gemm_fwd_with_pre(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    weight_layout: str,
) -> tuple[Tensor, Tensor]:
    """y and the values before the activation, both [M, N] in T. x and residual: [M, ...]."""
    b = weight if weight_layout == "nk" else weight.t()  # [N, K]
    y = x.new_empty(x.shape[0], b.shape[0])
    pre = torch.empty_like(y)
    backends.cuda_kernels().gemm_product_cuda(x, b, bias, residual, y, pre, activation)
    return y, pre


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

    One pass over dy and pre gives g = dy * activation'(pre) and dbias, then dx = g W and
    dW = g^T x are products of the forward's kernels along other strides.

    Args:
        dy: [..., N] in T.   x: [..., K].   weight: [N, K] or [K, N] by weight_layout.
        pre: [M, N], x W^T + bias; empty where there is no activation.
    """
    kernels = backends.cuda_kernels()
    dy, rows = as_rows(dy), as_rows(x)
    (M, N), nk = dy.shape, weight_layout == "nk"
    dx, dweight, dbias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    need_bias = bias is not None and need[2]
    acts, g, shares = activation is not None, dy, None
    if acts:
        g = torch.empty_like(pre)
    if need_bias:
        dbias = bias.new_empty(N)
        shares = x.new_empty((kernels.gemm_bwd_shares_cuda(M), N), dtype=torch.float32)
    if acts or need_bias:
        kernels.gemm_activation_bwd_cuda(
            dy,
            pre if acts else None,
            g if acts else None,
            shares,
            dbias if need_bias else None,
            activation or "none",
        )

    def product(a, b, out):
        """out [M, N] = a [M, K] b^T, b [N, K]."""
        kernels.gemm_product_cuda(a, b, None, None, out, None, "none")

    if need[0]:
        dx = x.new_empty(x.shape)
        if 1 not in weight.stride():
            weight = weight.contiguous()
        product(g, weight.t() if nk else weight, dx.view(rows.shape))
    if need[1]:
        dweight = weight.new_empty(weight.shape)
        product(*((g.t(), rows.t()) if nk else (rows.t(), g.t())), dweight)
    return dx, dweight, dbias


def unsupported_packed(x: Tensor, format: str) -> str | None:
    """Why packed_gemm cannot run, or None."""
    if format not in ("int8", "int4"):
        return f"the weight is packed as {format}, for the CPU; it takes int8 or int4"
    if x.dtype not in checks.LOW_PRECISION:
        return (
            f"x is {checks.name_of(x.dtype)}, beside a packed weight it takes bfloat16 or float16"
        )
    return None


def packed_gemm(
    x: Tensor,
    packed: Tensor,
    N: int,
    K: int,
    format: str,
    group: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """y [M, N] of x [M, K] by a weight packed as int8 or int4; residual [M, N]."""
    kernels = backends.cuda_kernels()
    y = x.new_empty(x.shape[0], N)
    workspace = x.new_empty(N, K) if x.shape[0] > kernels.packed_gemm_rows_cuda else None
    options = bias, residual, y, workspace, activation or "none"
    kernels.packed_gemm_fwd_cuda(x, packed, N, K, format, group, *options)
    return y

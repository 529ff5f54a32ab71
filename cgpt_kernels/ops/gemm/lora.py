"""gemm with a low-rank part: activation(x W^T + scale (x' A^T) B^T + bias) + residual.

Letters: M rows, K reduced width, N output width, r rank, T the dtype of x; u = x' A^T, x' is x
itself or what lora_dropout made of it. Source: LoRA, Hu et al., arXiv 2106.09685.

The term u B^T is added to the sums of x W^T while they are in cache (csrc/ops/gemm/low_rank.h), so
that y is written once. The gradient of x is the same product with everything transposed,
g W + scale (g B) A, and is made in one pass too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import backends, checks
from ..dispatch import (
    PLAIN,
    PLAIN_OR_NONE,
    REFUSALS,
    autocast_dtype,
    cast,
    choose,
    dense_last,
    once_differentiable,
    undisturbed,
)
from . import reference
from .backward import gemm_bwd_cpu
from .packed import PackedWeight

_C = backends._C


def gemm(
    product: Callable,
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    weight_layout: str,
    backend: str,
    lora: tuple,
) -> Tensor:
    """ops.gemm with its lora argument. product: ops.gemm itself, for what is not fused."""
    A, B, scale, x_low = _parts(lora)
    packed = type(weight) is PackedWeight
    if (
        _C is not None
        and backend in ("auto", "cpu")
        and type(x) in PLAIN
        and (packed or type(weight) in PLAIN)
        and type(A) in PLAIN
        and type(B) in PLAIN
        and {type(bias), type(residual), type(x_low)} <= PLAIN_OR_NONE
        and undisturbed()
        and x.is_cpu
        and x.dtype in backends.KERNEL_DTYPES
        and A.dtype in (x.dtype, torch.float32)
        and (packed or weight_layout in reference.LAYOUTS)
    ):
        given = (x, None if packed else weight, bias, residual, A, B, x_low)
        gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        try:
            if not gradient:
                u = _down(x if x_low is None else x_low, A)
                if packed:
                    return _packed(x, weight, bias, residual, activation, u, B, scale)
                kn = weight_layout == "kn"
                return _fused(x, weight, bias, residual, activation, kn, u, B, scale)
            if not packed:
                return _LoraGemm.apply(*given, scale, activation, weight_layout)
        except REFUSALS:
            pass  # the general path says why, or composes what the kernel does not take
    return _general(
        product, x, weight, bias, residual, activation, weight_layout, backend, A, B, scale, x_low
    )


def _parts(lora) -> tuple[Tensor, Tensor, float, Tensor | None]:
    if not isinstance(lora, tuple) or len(lora) not in (3, 4):
        raise TypeError(
            "gemm: lora must be None or a tuple (A, B, scale) or (A, B, scale, x'), got "
            f"{f'a tuple of {len(lora)}' if isinstance(lora, tuple) else type(lora).__name__}"
        )
    return lora if len(lora) == 4 else (*lora, None)


def _check(x, weight, A, B, scale, x_low, weight_layout) -> None:
    """Shapes and dtypes of the low-rank part; the rest is the product's to check."""
    op = "gemm"
    checks.is_tensor(op, "A of lora", A)
    checks.is_tensor(op, "B of lora", B)
    checks.is_tensor(op, "x' of lora", x_low, optional=True)
    checks.is_number(op, "scale of lora", scale)
    K = x.shape[-1]
    N = weight.shape[1 if weight_layout == "kn" and isinstance(weight, Tensor) else 0]
    checks.has_rank(op, "A of lora", A, 2, "(r, K)")
    checks.has_shape(op, "A of lora", A, (A.shape[0], K), "(r, K)")
    checks.has_shape(op, "B of lora", B, (N, A.shape[0]), "(N, r)")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    checks.has_dtype(op, "A of lora", A, x.dtype, wide, why=" beside this x")
    checks.has_dtype(op, "B of lora", B, A.dtype, why=" as A")
    if x_low is not None:
        checks.has_shape(op, "x' of lora", x_low, tuple(x.shape), "as x")
        checks.has_dtype(op, "x' of lora", x_low, x.dtype, A.dtype, why=" as x or A")


def _general(
    product, x, weight, bias, residual, activation, weight_layout, backend, A, B, scale, x_low
):
    """Autocast, graphs, other backends, subclasses, strides: three products, with their gradients.

    The low-rank part is handed to the product by x as its residual, so nothing is added apart
    unless an activation or a residual stands after it.
    """
    narrow = autocast_dtype(x.device.type) if isinstance(x, Tensor) else None
    if narrow is not None:
        device = x.device.type
        x, bias, A, B, x_low = cast(narrow, x, bias, A, B, x_low)
        late = None
        if isinstance(weight, Tensor):
            (weight,) = cast(narrow, weight)
        if isinstance(residual, Tensor) and residual.dtype != x.dtype:
            late, residual = residual, None  # as eager: a wide residual stream stays wide
        with torch.autocast(device, enabled=False):
            y = product(
                x,
                weight,
                bias,
                activation=activation,
                residual=residual,
                weight_layout=weight_layout,
                backend=backend,
                lora=(A, B, scale, x_low),
            )
        return y if late is None else y + late
    checks.is_tensor("gemm", "x", x)
    _check(x, weight, A, B, scale, x_low, weight_layout)
    packed = isinstance(weight, PackedWeight)
    chosen = choose("gemm", backend, (x, weight.data if packed else weight, bias, residual, A, B))
    if chosen == "eager":
        if packed:
            weight, weight_layout = weight.unpack(x.dtype), "nk"
        return reference.gemm(
            x, weight, bias, residual, activation, weight_layout, (A, B, scale, x_low)
        )
    u = product((x if x_low is None else x_low).to(A.dtype), A, backend=chosen) * scale
    only_sum = activation is None and residual is not None and A.dtype == x.dtype
    low = product(u, B, residual=residual if only_sum else None, backend=chosen).to(x.dtype)
    y = product(x, weight, bias, residual=low, weight_layout=weight_layout, backend=chosen)
    if only_sum:
        return y
    y = reference.activate(y, activation)
    return y if residual is None else y + residual


# ---- on the CPU kernels -------------------------------------------------------------------------


def _plain(x: Tensor, weight: Tensor, kn: bool) -> Tensor:
    """x [M, K] by weight [N, K], or [K, N] where kn."""
    return _C.gemm_fwd(x, weight, None, None, None, "none", kn)


def _fused(x, weight, bias, residual, activation, kn, u, v, scale, pre=None) -> Tensor:
    """activation(x W^T + scale u v^T + bias) + residual; pre receives what is activated."""
    return _C.gemm_low_rank_fwd(
        x, weight, bias, residual, None, activation or "none", kn, u, v, scale, pre
    )


def _packed(x, weight, bias, residual, activation, u, v, scale) -> Tensor:
    return _C.packed_gemm_low_rank_fwd(
        *(x, weight.data, weight.N, weight.K, weight.format, weight.group or 0),
        *(bias, residual, None, activation or "none", u, v, scale),
    )


def _down(x: Tensor, A: Tensor) -> Tensor:
    """u = x A^T in the dtype of A, [..., r]."""
    return _plain(x if x.dtype is A.dtype else x.to(A.dtype), A, False)


class _LoraGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, A, B, x_low, scale, activation, weight_layout):
        kn = weight_layout == "kn"
        u = _down(x if x_low is None else x_low, A)
        pre = None if activation is None else x.new_empty(*x.shape[:-1], B.shape[0])
        y = _fused(x, weight, bias, residual, activation, kn, u, B, scale, pre)
        ctx.save_for_backward(x, weight, bias, A, B, x_low, u, pre)
        ctx.options = scale, activation, weight_layout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, A, B, x_low, u, pre = ctx.saved_tensors
        scale, activation, weight_layout = ctx.options
        need_x, need_w, need_b, need_residual, need_A, need_B, need_low, *_ = ctx.needs_input_grad
        K, M, rank = x.shape[-1], x.shape[:-1].numel(), A.shape[0]
        g = dense_last(dy.reshape(M, dy.shape[-1]))  # sums hand down expanded gradients
        if activation is not None:
            g = reference.activation_grad(g, pre.view(g.shape), activation)
        wide = g if g.dtype is A.dtype else g.to(A.dtype)  # [M, N]
        kn = weight_layout == "kn"
        dx = dA = dB = dlow = None
        du = _plain(wide, B, True)  # g B [M, r], still to be scaled
        if need_x:
            if x_low is None:
                dx = _fused(g, weight, None, None, None, not kn, du, A.t(), scale)
            else:
                dx = _plain(g, weight, not kn)
            dx = dx.view(x.shape)
        if need_low:
            dlow = _plain(du * scale, A, True).to(x_low.dtype).view(x.shape)
        if need_A:
            low = (x if x_low is None else x_low).reshape(M, K)
            dA = _plain((du.t() * scale).contiguous(), low.to(A.dtype), True)  # [r, K]
        if need_B:
            dB = _plain((u.view(M, rank).t() * scale).contiguous(), wide, True).t()  # [N, r]
        dweight = dbias = None
        if need_w or need_b:
            how = None, weight_layout, 0.0, None, (False, need_w, need_b)
            _, dweight, dbias = gemm_bwd_cpu(g, x, weight, bias, None, *how)
        return (
            dx,
            dweight if need_w else None,
            dbias if need_b else None,
            dy if need_residual else None,
            dA,
            dB,
            dlow,
            *(None, None, None),
        )

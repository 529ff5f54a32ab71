"""gemm: contract, checks, autograd, registration.

Letters: M rows (all leading dimensions of x together), K reduced width, N output width, T the
dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backends, checks
from ..dispatch import (
    PLAIN,
    PLAIN_OR_NONE,
    REFUSALS,
    as_rows,
    autocast_dtype,
    cast,
    choose,
    define,
    dense_last,
    undisturbed,
    with_numpy,
)
from . import lora as low_rank
from . import packed, reference
from .backward import gemm_bwd

GEMM = backends.Op("gemm", "gemm", "gemm_fwd")

_lean = backends.lean_kernels("gemm")


def gemm(
    x: Tensor,
    weight: Tensor | packed.PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    lora: tuple | None = None,
    weight_layout: str = "nk",
    backend: str = "auto",
) -> Tensor:
    """activation(x W^T + bias) + residual in one pass, accumulated in fp32.

    With lora: activation(x W^T + scale (x A^T) B^T + bias) + residual, in one pass on the CPU,
    and the gradient of x as well.

    Args:
        x: [..., K], T one of fp32, bf16, fp16 (fp64 on backend "eager"). Rows are read in place
            when the last stride is 1. NumPy arrays are accepted everywhere.
        weight: [N, K] for weight_layout "nk" (nn.Linear), [K, N] for "kn" (GPT-2's Conv1D), T; or
            what pack_weight made of one, for inference on the CPU.
        bias: [N], T or fp32.
        activation: None, "gelu" (erf), "gelu_tanh" (tanh form) or "relu".
        residual: [..., N], T, added after the activation.
        lora: (A, B, scale), A [r, K] and B [N, r] in T or fp32, as LoRA's two nn.Linear store them;
            a fourth element, x' [..., K] in T or A's dtype, is multiplied by A in place of x (what
            lora_dropout leaves of x).
        backend: "auto" or a name; a name runs or raises.
    Returns:
        [..., N] in T, contiguous.
    Raises:
        ValueError, TypeError: before any memory is touched, naming argument, expected and got.
    """
    if lora is not None:
        options = activation, weight_layout, backend, lora
        return low_rank.gemm(gemm, x, weight, bias, residual, *options)
    if (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and type(bias) in PLAIN_OR_NONE
        and type(residual) in PLAIN_OR_NONE
        and undisturbed()
        and x.is_cpu
    ):
        kernel = _lean.get((backend, x.dtype))
        if kernel is not None and weight_layout in reference.LAYOUTS:
            try:
                if torch.is_grad_enabled() and (
                    x.requires_grad
                    or weight.requires_grad
                    or (bias is not None and bias.requires_grad)
                    or (residual is not None and residual.requires_grad)
                ):
                    return _Gemm.apply(kernel, x, weight, bias, residual, activation, weight_layout)
                # the binding allocates y: 0.25 us less than asking for its shape here
                kn = weight_layout == "kn"
                return kernel(x, weight, bias, residual, None, activation or "none", kn)
            except REFUSALS:
                pass  # the general path says why, or copies strides the kernel cannot read
    if type(weight) is packed.PackedWeight:
        return packed.gemm(x, weight, bias, residual, activation, weight_layout, backend)
    return _general(x, weight, bias, residual, activation, weight_layout, backend)


def _check(x, weight, bias, residual, activation, weight_layout):
    op = "gemm"
    checks.is_tensor(op, "x", x)
    checks.is_tensor(op, "weight", weight)
    checks.is_tensor(op, "bias", bias, optional=True)
    checks.is_tensor(op, "residual", residual, optional=True)
    given = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    checks.strided(op, given)
    checks.is_choice(op, "activation", activation, (None, *reference.ACTIVATIONS))
    checks.is_choice(op, "weight_layout", weight_layout, reference.LAYOUTS)
    checks.has_dtype(op, "x", x, *checks.FLOATING)
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have at least 1 dimension (..., K), got shape ()")
    K = x.shape[-1]
    checks.has_dtype(op, "weight", weight, x.dtype, why=" as x")
    nk = weight_layout == "nk"
    letters = "(N, K)" if nk else "(K, N)"
    checks.has_rank(op, "weight", weight, 2, letters)
    N = weight.shape[0 if nk else 1]
    checks.has_shape(op, "weight", weight, (N, K) if nk else (K, N), letters)
    if bias is not None:
        widest = x.dtype if x.dtype == torch.float64 else torch.float32
        checks.has_dtype(op, "bias", bias, x.dtype, widest, why=" beside this x")
        checks.has_shape(op, "bias", bias, (N,), "(N,)")
    if residual is not None:
        checks.has_dtype(op, "residual", residual, x.dtype, why=" as x")
        checks.has_shape(op, "residual", residual, (*x.shape[:-1], N), "(..., N)")
    checks.same_device(op, "x", given)


def _general(x, weight, bias, residual, activation, weight_layout, backend):
    """The way for everything but plain tensors in plain eager on the CPU."""
    if any(type(t).__module__ == "numpy" for t in (x, weight, bias, residual)):
        return with_numpy(
            gemm,
            x,
            weight,
            bias,
            activation=activation,
            residual=residual,
            weight_layout=weight_layout,
            backend=backend,
        )
    late_residual = None
    narrow = autocast_dtype(x.device.type) if isinstance(x, Tensor) else None
    if narrow is not None:
        x, weight, bias = cast(narrow, x, weight, bias)
        if isinstance(residual, Tensor) and residual.dtype != x.dtype:
            # as eager: a wide residual stream stays wide
            late_residual, residual = residual, None
    _check(x, weight, bias, residual, activation, weight_layout)
    chosen = choose("gemm", backend, (x, weight, bias, residual))
    run = reference.gemm if chosen == "eager" else _call_library(chosen)
    y = run(x, weight, bias, residual, activation, weight_layout)
    return y if late_residual is None else y + late_residual


def _call_library(backend):
    def run(x, weight, bias, residual, activation, weight_layout):
        keep_pre = (
            activation is not None
            and torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in (x, weight, bias))
        )
        return torch.ops.cgpt.gemm(
            x, weight, bias, residual, activation, weight_layout, keep_pre, backend
        )[0]

    return run


def _forward(kernel, x, weight, bias, residual, activation, weight_layout):
    """y [..., N]."""
    kn = weight_layout == "kn"
    N = weight.shape[1 if kn else 0]
    # sizes as arguments: a tuple of them takes 0.4 us to parse
    y = x.new_empty(x.shape[0], N) if x.ndim == 2 else x.new_empty(*x.shape[:-1], N)
    kernel(x, weight, bias, residual, y, activation or "none", kn)
    return y


def _forward_with_pre(kernel, x, weight, bias, residual, activation, weight_layout):
    """y and the values before the activation, which the gradient needs."""
    pre = _forward(kernel, x, weight, bias, None, None, weight_layout)
    y = reference.activate(pre, activation)
    if residual is not None:
        y += residual
    return y, pre.view(x.shape[:-1].numel(), pre.shape[-1])


class _Gemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, x, weight, bias, residual, activation, weight_layout):
        if activation is None:
            y = _forward(kernel, x, weight, bias, residual, None, weight_layout)
            pre = None
        else:
            y, pre = _forward_with_pre(kernel, x, weight, bias, residual, activation, weight_layout)
        ctx.save_for_backward(x, weight, bias, pre)
        ctx.options = activation, weight_layout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        _, *need, need_residual, _, _ = ctx.needs_input_grad
        grads = gemm_bwd(dy, *ctx.saved_tensors, *ctx.options, need)
        dx, dweight, dbias = (g if n else None for g, n in zip(grads, need, strict=True))
        return None, dx, dweight, dbias, dy if need_residual else None, None, None


# ---- torch.ops.cgpt -----------------------------------------------------------------------------


def _run(x, weight, bias, residual, activation, weight_layout, keep_pre, backend):
    kernel, _ = backends.implementation("gemm", backend)
    if 1 not in weight.stride():  # kernels read a transposed view in place
        weight = dense_last(weight)
    bias = bias if bias is None else dense_last(bias)
    residual = residual if residual is None else as_rows(residual)
    call = (kernel, as_rows(x), weight, bias, residual, activation, weight_layout)
    if keep_pre and activation is not None:
        with_pre = backends.own("gemm", backend, "gemm_fwd_with_pre")
        y, pre = with_pre(*call[1:]) if with_pre else _forward_with_pre(*call)
    else:
        y, pre = _forward(*call), x.new_empty(0)
    return y.view((*x.shape[:-1], y.shape[1])), pre


def _fake(x, weight, bias, residual, activation, weight_layout, keep_pre, backend):
    N = weight.shape[1 if weight_layout == "kn" else 0]
    y = x.new_empty(*x.shape[:-1], N)
    kept = keep_pre and activation is not None
    return y, x.new_empty(x.shape[:-1].numel(), N) if kept else x.new_empty(0)


def _save(ctx, inputs, output):
    x, weight, bias, _, activation, weight_layout, keep_pre, ctx.backend = inputs
    pre = output[1]
    ctx.mark_non_differentiable(pre)
    ctx.save_for_backward(x, weight, bias, pre)
    ctx.options = activation, weight_layout
    ctx.keep_pre = keep_pre


def _backward(ctx, dy, dpre):
    x, weight, bias, pre = ctx.saved_tensors
    activation, weight_layout = ctx.options
    need = ctx.needs_input_grad[:3]
    if activation is not None and not ctx.keep_pre:
        raise RuntimeError(
            "gemm: torch.ops.cgpt.gemm needs keep_pre=True to give gradients through an activation"
        )
    options = activation, weight_layout, need, ctx.backend
    grads = torch.ops.cgpt.gemm_bwd(dy, x, weight, bias, pre, *options)
    dx, dweight, dbias = (g if n else None for g, n in zip(grads, need, strict=True))
    dresidual = dy if ctx.needs_input_grad[3] else None
    return dx, dweight, dbias, dresidual, None, None, None, None


def _run_bwd(dy, x, weight, bias, pre, activation, weight_layout, need, backend):
    bwd = backends.own("gemm", backend, "gemm_bwd") or gemm_bwd
    return bwd(dy, x, weight, bias, pre, activation, weight_layout, need)


def _fake_bwd(dy, x, weight, bias, pre, activation, weight_layout, need, backend):
    return (
        x.new_empty(x.shape if need[0] else 0),
        weight.new_empty(weight.shape if need[1] else 0),
        bias.new_empty(bias.shape) if need[2] and bias is not None else weight.new_empty(0),
    )


def _autocast(device_type, x, weight, bias, residual, *rest):
    return (*cast(autocast_dtype(device_type), x, weight, bias, residual), *rest)


define(
    "gemm(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str? activation,"
    " str weight_layout, bool keep_pre, str backend) -> (Tensor y, Tensor pre)",
    _run,
    _fake,
    save=_save,
    backward=_backward,
    autocast=_autocast,
)
define(
    "gemm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor pre, str? activation,"
    " str weight_layout, bool[3] need, str backend)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _run_bwd,
    _fake_bwd,
)

"""layer_norm and add_layer_norm: contract, checks, autograd, registration.

Letters: C normalised width, rows all leading dimensions together, T the dtype of x.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ... import backends, checks
from ..dispatch import (
    PLAIN,
    REFUSALS,
    any_numpy,
    as_rows,
    autocast_dtype,
    cast,
    choose,
    define,
    dense_last,
    once_differentiable,
    undisturbed,
    with_numpy,
)
from . import reference
from .backward import layer_norm_bwd, layer_norm_bwd_cpu


def _shape_class(tensors: tuple) -> str:
    """Where the CUDA kernels hold a row: in a warp, in a block, nowhere."""
    C = tensors[0].shape[-1]
    return "C <= 1024" if C <= 1024 else "C <= 8192" if C <= 8192 else "C > 8192"


LAYER_NORM, ADD_LAYER_NORM = (
    backends.Op(name, "layer_norm", "layer_norm_fwd", shape_class=_shape_class)
    for name in ("layer_norm", "add_layer_norm")
)

_lean = backends.lean_kernels("layer_norm")
_empty_like = torch.empty_like  # the look-up in torch's namespace costs 0.1 us a call


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension, var biased.

    Args:
        x: [..., C], T one of fp32, bf16, fp16 (fp64 on backend "eager"). Rows are read in place
            when the last stride is 1. NumPy arrays are accepted everywhere.
        weight, bias: [C], T or fp32.
        eps: added to the variance.
        backend: "auto" or a name; a name runs or raises.
    Returns:
        [..., C] in T, contiguous. Statistics are taken in fp32.
    Raises:
        ValueError, TypeError: before any memory is touched, naming argument, expected and got.
    """
    if (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and undisturbed()
        and x.is_cpu
    ):
        try:
            kernel = _lean.get((backend, x.dtype))
            if kernel is not None:
                if torch.is_grad_enabled() and (
                    x.requires_grad
                    or weight.requires_grad
                    or (bias is not None and bias.requires_grad)
                ):
                    return _LayerNorm.apply(kernel, x, None, weight, bias, eps)
                y = _empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)
                kernel(x, None, weight, bias, y, None, None, None, eps)
                return y
        except REFUSALS:
            pass  # the general path says why, or copies strides the kernel cannot read
    return _general("layer_norm", x, None, weight, bias, eps, backend)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """s = x + residual; returns (layer_norm(s), s). The statistics are those of s as rounded to T.

    Args:
        x, residual: [..., C], T as for layer_norm.
        weight, bias, eps, backend: as for layer_norm.
    Returns:
        y, s: [..., C] in T, contiguous.
    """
    if (
        type(x) in PLAIN
        and type(residual) in PLAIN
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and undisturbed()
        and x.is_cpu
    ):
        try:
            kernel = _lean.get((backend, x.dtype))
            if kernel is not None:
                if torch.is_grad_enabled() and (
                    x.requires_grad
                    or residual.requires_grad
                    or weight.requires_grad
                    or (bias is not None and bias.requires_grad)
                ):
                    return _LayerNorm.apply(kernel, x, residual, weight, bias, eps)
                y = _empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)
                total = _empty_like(y)
                kernel(x, residual, weight, bias, y, total, None, None, eps)
                return y, total
        except REFUSALS:
            pass  # the general path says why, or copies strides the kernel cannot read
    return _general("add_layer_norm", x, residual, weight, bias, eps, backend)


def _check(op, x, residual, weight, bias, eps):
    for name, value in (("x", x), ("weight", weight)):
        checks.is_tensor(op, name, value)
    if op == "add_layer_norm":
        checks.is_tensor(op, "residual", residual)
    checks.is_tensor(op, "bias", bias, optional=True)
    given = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    checks.strided(op, given)
    checks.is_number(op, "eps", eps)
    checks.has_dtype(op, "x", x, *checks.FLOATING)
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have at least 1 dimension (..., C), got shape ()")
    C = x.shape[-1]
    if residual is not None:
        checks.has_dtype(op, "residual", residual, x.dtype, why=" as x")
        checks.has_shape(op, "residual", residual, x.shape, "the shape of x")
    parameter_dtypes = {x.dtype} if x.dtype == torch.float64 else {x.dtype, torch.float32}
    for name in ("weight", "bias"):
        if given[name] is not None:
            checks.has_dtype(op, name, given[name], *parameter_dtypes, why=" beside this x")
            checks.has_shape(op, name, given[name], (C,), "(C,)")
    checks.same_device(op, "x", given)


def _general(op, x, residual, weight, bias, eps, backend):
    """The way for everything but plain tensors in plain eager on the CPU."""
    function = layer_norm if residual is None else add_layer_norm
    tensors = (x, weight, bias) if op == "layer_norm" else (x, residual, weight, bias)
    if any_numpy(*tensors):
        return with_numpy(function, *tensors, eps=eps, backend=backend)
    if isinstance(x, Tensor) and autocast_dtype(x.device.type) is not None:
        x, residual = _autocast(x.device.type, x, residual)
    _check(op, x, residual, weight, bias, eps)
    tensors = (x, weight, bias) if residual is None else (x, residual, weight, bias)
    chosen = choose(op, backend, tensors)
    if residual is None:
        if chosen == "eager":
            return reference.layer_norm(x, weight, bias, eps)
        return _layer_norm_op(x, weight, bias, eps, chosen)[0]
    if chosen == "eager":
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    return _add_layer_norm_op(x, residual, weight, bias, eps, chosen)[:2]


def _autocast(device_type, x, residual):
    # As eager: layer_norm runs in fp32 under CUDA autocast and as it comes under CPU autocast,
    # and x + residual promotes.
    if device_type == "cuda":
        return cast(torch.float32, x, residual)
    if residual is not None and isinstance(residual, Tensor) and residual.dtype != x.dtype:
        wide = torch.promote_types(x.dtype, residual.dtype)
        return x.to(wide), residual.to(wide)
    return x, residual


def _forward(kernel, x, residual, weight, bias, eps):
    """y, sum (None without residual), mean, rstd."""
    y = _empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)
    total = None if residual is None else _empty_like(y)
    mean = x.new_empty(prod(x.shape[:-1]), dtype=torch.float32)
    rstd = _empty_like(mean)
    kernel(x, residual, weight, bias, y, total, mean, rstd, eps)
    return y, total, mean, rstd


class _LayerNorm(torch.autograd.Function):
    """layer_norm on the CPU kernel, or add_layer_norm where residual is given."""

    @staticmethod
    def forward(ctx, kernel, x, residual, weight, bias, eps):
        y, total, mean, rstd = _forward(kernel, x, residual, weight, bias, eps)
        ctx.save_for_backward(x if total is None else total, weight, bias, mean, rstd)
        ctx.set_materialize_grads(False)
        return y if total is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtotal=None):
        _, need_x, need_residual, need_weight, need_bias, _ = ctx.needs_input_grad
        if dy is None:
            return None, dtotal, dtotal, None, None, None
        need = (need_x or need_residual, need_weight, need_bias)
        dx, dweight, dbias = layer_norm_bwd_cpu(dy, dtotal, *ctx.saved_tensors, need)
        return None, dx if need_x else None, dx if need_residual else None, dweight, dbias, None


# ---- torch.ops.cgpt -----------------------------------------------------------------------------


def _run(x, weight, bias, eps, backend):
    y, _, mean, rstd = _run_add(x, None, weight, bias, eps, backend)
    return y, mean, rstd


def _fake(x, weight, bias, eps, backend):
    rows = prod(x.shape[:-1])  # Size.numel() would make a constant of a traced size
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _save(ctx, inputs, output):
    x, weight, bias, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _backward(ctx, dy, dmean, drstd):
    need = ctx.needs_input_grad[:3]
    grads = _layer_norm_bwd_op(dy, None, *ctx.saved_tensors, need, ctx.backend)
    return (*(g if n else None for g, n in zip(grads, need, strict=True)), None, None)


def _run_add(x, residual, weight, bias, eps, backend):
    kernel, _ = backends.implementation("layer_norm", backend)
    shape, x = x.shape, as_rows(x)
    if residual is not None:
        residual = as_rows(residual)
    weight, bias = dense_last(weight), bias if bias is None else dense_last(bias)
    if bias is not None and bias.dtype != weight.dtype:  # kernels take parameters of one dtype
        weight, bias = weight.float(), bias.float()
    y, total, mean, rstd = _forward(kernel, x, residual, weight, bias, eps)
    return y.view(shape), None if total is None else total.view(shape), mean, rstd


def _fake_add(x, residual, weight, bias, eps, backend):
    y, mean, rstd = _fake(x, weight, bias, eps, backend)
    return y, torch.empty_like(y), mean, rstd


def _save_add(ctx, inputs, output):
    _, _, weight, bias, _, ctx.backend = inputs
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(total, weight, bias, mean, rstd)


def _backward_add(ctx, dy, dtotal, dmean, drstd):
    need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
    need = (need_x or need_residual, need_weight, need_bias)
    dx, dweight, dbias = _layer_norm_bwd_op(dy, dtotal, *ctx.saved_tensors, need, ctx.backend)
    return (
        dx if need_x else None,
        dx if need_residual else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        None,
        None,
    )


def _run_bwd(dy, dtotal, x, weight, bias, mean, rstd, need, backend):
    if backend == "cpu":
        grads = layer_norm_bwd_cpu(dy, dtotal, x, weight, bias, mean, rstd, need)
        return tuple(weight.new_empty(0) if grad is None else grad for grad in grads)
    bwd = backends.own("layer_norm", backend, "layer_norm_bwd") or layer_norm_bwd
    return bwd(dy, dtotal, x, weight, bias, mean, rstd, need)


def _fake_bwd(dy, dtotal, x, weight, bias, mean, rstd, need, backend):
    return (
        x.new_empty(x.shape if need[0] else 0),
        weight.new_empty(weight.shape if need[1] else 0),
        bias.new_empty(bias.shape) if need[2] and bias is not None else weight.new_empty(0),
    )


_layer_norm_op = define(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, str backend)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    _run,
    _fake,
    save=_save,
    backward=_backward,
    autocast=lambda device_type, x, *rest: (_autocast(device_type, x, None)[0], *rest),
)
_add_layer_norm_op = define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps,"
    " str backend) -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
    _run_add,
    _fake_add,
    save=_save_add,
    backward=_backward_add,
    autocast=lambda device_type, x, residual, *rest: (
        *_autocast(device_type, x, residual),
        *rest,
    ),
)
_layer_norm_bwd_op = define(
    "layer_norm_bwd(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor? bias, Tensor mean,"
    " Tensor rstd, bool[3] need, str backend) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _run_bwd,
    _fake_bwd,
)

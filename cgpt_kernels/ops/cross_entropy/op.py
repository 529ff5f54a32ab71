"""linear_cross_entropy: contract, checks, autograd, registration.

Letters: M rows (all leading dimensions of x together), K width, V vocabulary, T the dtype of x.
"""

from __future__ import annotations

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

LINEAR_CROSS_ENTROPY = backends.Op(
    "linear_cross_entropy", "cross_entropy", "linear_cross_entropy_fwd"
)

_lean = backends.lean_kernels("linear_cross_entropy")
_empty_like = torch.empty_like  # the look-up in torch's namespace costs 0.1 us a call
_SCALAR = torch.empty((), dtype=torch.float32, device="cpu")
_reduced = getattr(backends._C, "linear_cross_entropy_reduced", None)
_kernel_grads = getattr(backends._C, "linear_cross_entropy_grads", None)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of logits = x W^T + bias against target; the [M, V] logits are never held.

    Args:
        x: [..., K], T one of fp32, bf16, fp16 (fp64 on backend "eager"). NumPy arrays are accepted
            everywhere.
        weight: [V, K], T, e.g. the tied embedding.
        target: [...], int64, each in [0, V) or equal to ignore_index.
        bias: [V], T or fp32.
        ignore_index: rows with this target count nothing and get no gradient.
        reduction: "mean" over the rows that count (NaN where none does, as
            torch.nn.functional.cross_entropy), "sum", or "none".
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].
        backend: "auto" or a name; a name runs or raises.
    Returns:
        0-d, or [...] for reduction "none"; fp32 whatever T is (fp64 for fp64), since a bf16 loss
        has 2 digits.
    Raises:
        ValueError, TypeError: before any memory is touched, naming argument, expected and got.
    """
    if (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and type(target) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and undisturbed()
        and x.is_cpu
    ):
        try:
            kernel = _lean.get((backend, x.dtype))
            if kernel is not None and reduction in reference.REDUCTIONS:
                if torch.is_grad_enabled() and (
                    x.requires_grad
                    or weight.requires_grad
                    or (bias is not None and bias.requires_grad)
                ):
                    options = ignore_index, label_smoothing
                    if _ahead(x.dtype, reduction):
                        return _WithGrads.apply(
                            x, weight, target, bias, *options, reduction == "mean"
                        )
                    rows = _Rows.apply(kernel, x, weight, target, bias, *options)
                    return reference.reduce_rows(rows, target, ignore_index, reduction)
                options = ignore_index, label_smoothing
                if reduction == "none":
                    loss = x.new_empty(target.shape, dtype=torch.float32)
                    kernel(x, weight, bias, target, loss.view(-1), None, *options)
                else:
                    loss = _empty_like(_SCALAR)
                    _reduced(x, weight, bias, target, loss, *options, reduction == "mean")
                return loss
        except REFUSALS:
            pass  # the general path says why, or copies strides the kernel cannot read
    return _general(x, weight, target, bias, ignore_index, reduction, label_smoothing, backend)


def _check(x, weight, target, bias, ignore_index, reduction, label_smoothing):
    op = "linear_cross_entropy"
    checks.is_tensor(op, "x", x)
    checks.is_tensor(op, "weight", weight)
    checks.is_tensor(op, "target", target)
    checks.is_tensor(op, "bias", bias, optional=True)
    given = {"x": x, "weight": weight, "target": target, "bias": bias}
    checks.strided(op, given)
    checks.is_choice(op, "reduction", reduction, reference.REDUCTIONS)
    if not isinstance(ignore_index, int) or not -(2**63) <= ignore_index < 2**63:
        raise TypeError(f"{op}: ignore_index must be an int in 64 bits, got {ignore_index!r}")
    checks.is_number(op, "label_smoothing", label_smoothing)
    in_unit = 0.0 <= label_smoothing <= 1.0
    checks.in_range(op, "label_smoothing", label_smoothing, in_unit, "in [0, 1]")
    checks.has_dtype(op, "x", x, *checks.FLOATING)
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have at least 1 dimension (..., K), got shape ()")
    checks.has_dtype(op, "weight", weight, x.dtype, why=" as x")
    checks.has_rank(op, "weight", weight, 2, "(V, K)")
    V = weight.shape[0]
    checks.has_shape(op, "weight", weight, (V, x.shape[-1]), "(V, K)")
    checks.has_dtype(op, "target", target, torch.int64)
    checks.has_shape(op, "target", target, x.shape[:-1], "the leading dimensions of x")
    if bias is not None:
        widest = x.dtype if x.dtype == torch.float64 else torch.float32
        checks.has_dtype(op, "bias", bias, x.dtype, widest, why=" beside this x")
        checks.has_shape(op, "bias", bias, (V,), "(V,)")
    checks.same_device(op, "x", given)


def _general(x, weight, target, bias, ignore_index, reduction, label_smoothing, backend):
    """The way for everything but plain tensors in plain eager on the CPU."""
    if any_numpy(x, weight, target, bias):
        return with_numpy(
            linear_cross_entropy,
            x,
            weight,
            target,
            bias,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            backend=backend,
        )
    narrow = autocast_dtype(x.device.type) if isinstance(x, Tensor) else None
    if narrow is not None:
        x, weight, bias = cast(narrow, x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):  # the lean path may serve now
            return linear_cross_entropy(
                x,
                weight,
                target,
                bias,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
                backend=backend,
            )
    _check(x, weight, target, bias, ignore_index, reduction, label_smoothing)
    chosen = choose("linear_cross_entropy", backend, (x, weight, target, bias))
    if chosen == "eager":
        rows = reference.linear_cross_entropy_rows(
            x.reshape(target.numel(), x.shape[-1]),
            weight,
            target.reshape(-1),
            bias,
            ignore_index,
            label_smoothing,
        )
    elif chosen == "cpu" and _ahead(x.dtype, reduction) and any(_need(x, weight, bias)):
        need = _need(x, weight, bias)
        options = ignore_index, label_smoothing, reduction == "mean", need, chosen
        return _linear_cross_entropy_grads_op(x, weight, target, bias, *options)[0]
    else:
        rows = _linear_cross_entropy_op(
            x, weight, target, bias, ignore_index, label_smoothing, chosen
        )[0]
    return reference.reduce_rows(rows, target, ignore_index, reduction)


def _forward(kernel, x, weight, target, bias, ignore_index, label_smoothing):
    """Losses [M] and lse [M], fp32."""
    loss = x.new_empty(target.numel(), dtype=torch.float32)
    lse = torch.empty_like(loss)
    kernel(
        x,
        weight,
        bias,
        target,
        loss,
        lse,
        ignore_index,
        label_smoothing,
    )
    return loss, lse


def _ahead(dtype: torch.dtype, reduction: str) -> bool:
    """Whether the gradients are made with the loss, before the incoming gradient is known, which
    then scales them. Not in fp16: a gradient of the mean over 500 rows is below what fp16 holds
    until GradScaler's factor comes in with the incoming gradient.
    """
    return reduction != "none" and dtype is not torch.float16


def _need(x, weight, bias) -> tuple[bool, bool, bool]:
    on = torch.is_grad_enabled()
    return tuple(on and t is not None and t.requires_grad for t in (x, weight, bias))


def _grads(x, weight, target, bias, drows, loss, options, need, mean=False):
    """[dx, dweight, dbias], None where not needed; without drows the 0-d loss is written too."""
    made = [
        t.new_empty(t.shape) if n and t is not None else None
        for t, n in zip((x, weight, bias), need, strict=True)
    ]
    _kernel_grads(x, weight, bias, target, drows, loss, *made, *options, mean)
    return made


class _WithGrads(torch.autograd.Function):
    """The mean or sum of the losses; the gradients are made with it and wait for the backward."""

    @staticmethod
    def forward(ctx, x, weight, target, bias, ignore_index, label_smoothing, mean):
        need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        ctx.need = need_x, need_weight, need_bias
        ctx.save_for_backward(x, weight, target, bias)
        ctx.options, ctx.mean = (ignore_index, label_smoothing), mean
        loss = _empty_like(_SCALAR)
        ctx.grads = _grads(x, weight, target, bias, None, loss, ctx.options, ctx.need, mean)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        # Handed out once, so that a parameter may take them as its .grad without a copy; another
        # backward through a retained graph makes them anew.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            x, weight, target, bias = ctx.saved_tensors
            loss = _empty_like(_SCALAR)
            grads = _grads(x, weight, target, bias, None, loss, ctx.options, ctx.need, ctx.mean)
        factor = dloss.item()
        if factor != 1.0:
            for grad in grads:
                if grad is not None:
                    grad *= factor
        dx, dweight, dbias = grads
        return dx, dweight, None, dbias, None, None, None


class _Rows(torch.autograd.Function):
    """Losses of the rows; the reduction is left to torch."""

    @staticmethod
    def forward(ctx, kernel, x, weight, target, bias, ignore_index, label_smoothing):
        ctx.save_for_backward(x, weight, target, bias)
        ctx.options = ignore_index, label_smoothing
        return _forward(kernel, x, weight, target, bias, ignore_index, label_smoothing)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, drows):
        _, need_x, need_weight, _, need_bias, _, _ = ctx.needs_input_grad
        need = need_x, need_weight, need_bias
        dx, dweight, dbias = _grads(*ctx.saved_tensors, drows, None, ctx.options, need)
        return None, dx, dweight, None, dbias, None, None


# ---- torch.ops.cgpt -----------------------------------------------------------------------------


def _run(x, weight, target, bias, ignore_index, label_smoothing, backend):
    kernel, _ = backends.implementation("linear_cross_entropy", backend)
    bias = bias if bias is None else dense_last(bias)
    x, weight, target = as_rows(x), dense_last(weight), dense_last(target.reshape(-1))
    return _forward(kernel, x, weight, target, bias, ignore_index, label_smoothing)


def _fake(x, weight, target, bias, ignore_index, label_smoothing, backend):
    loss = x.new_empty(target.numel(), dtype=torch.float32)
    return loss, torch.empty_like(loss)


def _save(ctx, inputs, output):
    x, weight, target, bias, ignore_index, label_smoothing, ctx.backend = inputs
    lse = output[1]
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(x, weight, target, bias, lse)
    ctx.options = ignore_index, label_smoothing


def _backward(ctx, drows, dlse):
    need_x, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    need = need_x, need_weight, need_bias
    options = *ctx.options, need, ctx.backend
    grads = _linear_cross_entropy_bwd_op(drows, *ctx.saved_tensors, *options)
    dx, dweight, dbias = (g if n else None for g, n in zip(grads, need, strict=True))
    return dx, dweight, None, dbias, None, None, None


def _run_bwd(drows, x, weight, target, bias, lse, ignore_index, label_smoothing, need, backend):
    M, K = target.numel(), x.shape[-1]
    x_rows, target, options = x.reshape(M, K), target.reshape(M), (ignore_index, label_smoothing)
    if backend == "cpu":
        tensors = as_rows(x_rows), dense_last(weight), target, _dense(bias)
        grads = _full(weight, _grads(*tensors, drows, None, options, need))
    else:
        own = backends.own("linear_cross_entropy", backend, "linear_cross_entropy_bwd")
        grads = own(drows, x_rows, weight, target, bias, lse, *options, need)
    dx, dweight, dbias = grads
    return dx.view(x.shape) if need[0] else dx, dweight, dbias


def _dense(bias):
    return bias if bias is None else dense_last(bias)


def _full(like, grads):
    """The library's outputs: empty tensors in the place of None."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def _run_grads(x, weight, target, bias, ignore_index, label_smoothing, mean, need, backend):
    tensors = as_rows(x), dense_last(weight), dense_last(target.reshape(-1)), _dense(bias)
    loss, options = x.new_empty((), dtype=torch.float32), (ignore_index, label_smoothing)
    grads = _full(weight, _grads(*tensors, None, loss, options, need, mean))
    return loss, grads[0].view(x.shape) if need[0] else grads[0], *grads[1:]


def _fake_grads(x, weight, target, bias, ignore_index, label_smoothing, mean, need, backend):
    loss = x.new_empty((), dtype=torch.float32)
    return loss, *_fake_bwd(
        loss, x, weight, target, bias, None, ignore_index, label_smoothing, need, backend
    )


def _save_grads(ctx, inputs, output):
    ctx.need = inputs[7]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _scale_grads(ctx, dloss, *_):
    grads = zip(ctx.saved_tensors, ctx.need, strict=True)
    dx, dweight, dbias = (grad * dloss if need else None for grad, need in grads)
    return dx, dweight, None, dbias, None, None, None, None, None


def _fake_bwd(drows, x, weight, target, bias, lse, ignore_index, label_smoothing, need, backend):
    return (
        x.new_empty(x.shape if need[0] else 0),
        weight.new_empty(weight.shape if need[1] else 0),
        bias.new_empty(bias.shape) if need[2] and bias is not None else weight.new_empty(0),
    )


def _autocast(device_type, x, weight, target, bias, *rest):
    x, weight, bias = cast(autocast_dtype(device_type), x, weight, bias)
    return (x, weight, target, bias, *rest)


_linear_cross_entropy_op = define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, Tensor? bias,"
    " SymInt ignore_index, float label_smoothing, str backend) -> (Tensor loss, Tensor lse)",
    _run,
    _fake,
    save=_save,
    backward=_backward,
    autocast=_autocast,
)
_linear_cross_entropy_bwd_op = define(
    "linear_cross_entropy_bwd(Tensor drows, Tensor x, Tensor weight, Tensor target, Tensor? bias,"
    " Tensor? lse, SymInt ignore_index, float label_smoothing, bool[3] need, str backend)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _run_bwd,
    _fake_bwd,
)
_linear_cross_entropy_grads_op = define(
    "linear_cross_entropy_grads(Tensor x, Tensor weight, Tensor target, Tensor? bias,"
    " SymInt ignore_index, float label_smoothing, bool mean, bool[3] need, str backend)"
    " -> (Tensor loss, Tensor dx, Tensor dweight, Tensor dbias)",
    _run_grads,
    _fake_grads,
    save=_save_grads,
    backward=_scale_grads,
    autocast=_autocast,
)

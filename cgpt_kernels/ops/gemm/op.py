"""gemm: contract, checks, autograd, registration.

Letters: M rows (all leading dimensions of x together), K reduced width, N output width, T the
dtype of x.
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
from ..philox import SEED_END, check_dropout, seed_tensor
from . import lora as low_rank
from . import packed, reference
from .backward import gemm_bwd, gemm_bwd_cpu


def _shape_class(tensors: tuple) -> str:
    """A step of decoding, a prompt, a batch of training."""
    rows = tensors[0].shape[:-1].numel()
    return "M <= 16" if rows <= 16 else "M <= 1024" if rows <= 1024 else "M > 1024"


GEMM = backends.Op("gemm", "gemm", "gemm_fwd", shape_class=_shape_class)

_lean = backends.lean_kernels("gemm")
_training_kernel = getattr(backends._C, "gemm_fwd_training", None)


def gemm(
    x: Tensor,
    weight: Tensor | packed.PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    lora: tuple | None = None,
    weight_layout: str = "nk",
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """dropout(activation(x W^T + bias)) + residual in one pass, accumulated in fp32.

    With lora: activation(x W^T + scale (x A^T) B^T + bias) + residual, in one pass on the CPU,
    and the gradient of x as well.

    Args:
        x: [..., K], T one of fp32, bf16, fp16 (fp64 on backend "eager"). Rows are read in place
            when the last stride is 1. NumPy arrays are accepted everywhere.
        weight: [N, K] for weight_layout "nk" (nn.Linear), [K, N] for "kn" (GPT-2's Conv1D), T; or
            what pack_weight made of one, for inference on the CPU.
        bias: [N], T or fp32.
        activation: None, "gelu" (erf), "gelu_tanh" (tanh form) or "relu".
        residual: [..., N], T, added last.
        lora: (A, B, scale), A [r, K] and B [N, r] in T or fp32, as LoRA's two nn.Linear store them;
            a fourth element, x' [..., K] in T or A's dtype, is multiplied by A in place of x (what
            lora_dropout leaves of x).
        dropout_p: probability in [0, 1) of dropping each element, applied in every mode; pass 0.0
            in evaluation. Element (i, n) of the M rows is element i * N + n of the mask.
        seed: int in [0, 2^63) that fixes the mask on every backend, bit for bit; None draws one
            from torch's default CPU generator, so torch.manual_seed governs it.
        backend: "auto" or a name; a name runs or raises.
    Returns:
        [..., N] in T, contiguous.
    Raises:
        ValueError, TypeError: before any memory is touched, naming argument, expected and got.
    """
    if lora is not None:
        options = activation, weight_layout, backend, lora
        check_dropout("gemm", dropout_p, seed)
        if any_numpy(x, weight, bias, residual):
            return with_numpy(
                gemm,
                x,
                weight,
                bias,
                activation=activation,
                residual=residual,
                lora=lora,
                weight_layout=weight_layout,
                dropout_p=dropout_p,
                seed=seed,
                backend=backend,
            )
        if dropout_p == 0.0:
            return low_rank.gemm(gemm, x, weight, bias, residual, *options)
        y = low_rank.gemm(gemm, x, weight, bias, None, *options)
        y = reference.dropout(y, dropout_p, seed_tensor(dropout_p, seed))
        return y if residual is None else y + residual
    if (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and (residual is None or type(residual) in PLAIN)
        and undisturbed()
        and x.is_cpu
    ):
        try:
            kernel = _lean.get((backend, x.dtype))
            if kernel is not None and weight_layout in reference.LAYOUTS:
                if torch.is_grad_enabled() and (
                    x.requires_grad
                    or weight.requires_grad
                    or (bias is not None and bias.requires_grad)
                    or (residual is not None and residual.requires_grad)
                ):
                    if dropout_p != 0.0:
                        check_dropout("gemm", dropout_p, seed)
                        if seed is None:
                            seed = int(torch.randint(SEED_END - 1, ()))
                    return _Gemm.apply(
                        kernel, x, weight, bias, residual, activation, weight_layout, dropout_p,
                        seed,
                    )  # fmt: skip
                if dropout_p == 0.0 and seed is None:
                    # the binding allocates y: 0.25 us less than asking for its shape here
                    kn = weight_layout == "kn"
                    return kernel(x, weight, bias, residual, None, activation or "none", kn)
        except REFUSALS:
            pass  # the general path says why, or copies strides the kernel cannot read
    options = activation, weight_layout, dropout_p, seed, backend
    if type(weight) is packed.PackedWeight:
        return packed.gemm(x, weight, bias, residual, *options)
    return _general(x, weight, bias, residual, *options)


def _check(x, weight, bias, residual, activation, weight_layout, dropout_p, seed):
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
    check_dropout(op, dropout_p, seed)


def _general(x, weight, bias, residual, activation, weight_layout, dropout_p, seed, backend):
    """The way for everything but plain tensors in plain eager on the CPU."""
    if any_numpy(x, weight, bias, residual):
        return with_numpy(
            gemm,
            x,
            weight,
            bias,
            activation=activation,
            residual=residual,
            weight_layout=weight_layout,
            dropout_p=dropout_p,
            seed=seed,
            backend=backend,
        )
    late_residual = None
    narrow = autocast_dtype(x.device.type) if isinstance(x, Tensor) else None
    if narrow is not None:
        x, weight, bias = cast(narrow, x, weight, bias)
        if isinstance(residual, Tensor) and residual.dtype != x.dtype:
            # as eager: a wide residual stream stays wide
            late_residual, residual = residual, None
    _check(x, weight, bias, residual, activation, weight_layout, dropout_p, seed)
    chosen = choose("gemm", backend, (x, weight, bias, residual))
    run = reference.gemm if chosen == "eager" else _call_library(chosen)
    drops = {"dropout_p": dropout_p, "seed": seed_tensor(dropout_p, seed)}
    y = run(x, weight, bias, residual, activation, weight_layout, **drops)
    return y if late_residual is None else y + late_residual


def _call_library(backend):
    def run(x, weight, bias, residual, activation, weight_layout, dropout_p, seed):
        keep_pre = (
            activation is not None
            and torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in (x, weight, bias))
        )
        options = activation, weight_layout, dropout_p, seed, keep_pre, backend
        return _gemm_op(x, weight, bias, residual, *options)[0]

    return run


def _allocate(x, weight, weight_layout):
    """An empty y [..., N]."""
    N = weight.shape[1 if weight_layout == "kn" else 0]
    # sizes as arguments: a tuple of them takes 0.4 us to parse
    return x.new_empty(x.shape[0], N) if x.ndim == 2 else x.new_empty(*x.shape[:-1], N)


def _forward(kernel, x, weight, bias, residual, activation, weight_layout):
    """y [..., N]."""
    y = _allocate(x, weight, weight_layout)
    kernel(x, weight, bias, residual, y, activation or "none", weight_layout == "kn")
    return y


def _forward_training(
    x, weight, bias, residual, activation, weight_layout, dropout_p, seed, keep_pre
):
    """y [..., N], and the values before the activation [M, N] or None, by the CPU kernel."""
    y = _allocate(x, weight, weight_layout)
    pre = x.new_empty(x.shape[:-1].numel(), y.shape[-1]) if keep_pre else None
    options = activation or "none", weight_layout == "kn", dropout_p, seed or 0
    _training_kernel(x, weight, bias, residual, y, pre, *options)
    return y, pre


def _forward_with_pre(kernel, x, weight, bias, residual, activation, weight_layout):
    """y and the values before the activation, by a kernel that writes only one of them."""
    pre = _forward(kernel, x, weight, bias, None, None, weight_layout)
    y = reference.activate(pre, activation)
    if residual is not None:
        y += residual
    return y, pre


class _Gemm(torch.autograd.Function):
    """On the CPU kernel; seed is an int wherever dropout_p is not 0."""

    @staticmethod
    def forward(ctx, kernel, x, weight, bias, residual, activation, weight_layout, dropout_p, seed):
        call = x, weight, bias, residual, activation, weight_layout
        if activation is None and dropout_p == 0.0:
            y, pre = _forward(kernel, *call), None
        else:
            y, pre = _forward_training(*call, dropout_p, seed, activation is not None)
        ctx.save_for_backward(x, weight, bias, pre)
        ctx.options = activation, weight_layout, dropout_p, seed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        _, *need, need_residual, _, _, _, _ = ctx.needs_input_grad
        grads = gemm_bwd_cpu(dy, *ctx.saved_tensors, *ctx.options, need)
        dx, dweight, dbias = (g if n else None for g, n in zip(grads, need, strict=True))
        return None, dx, dweight, dbias, dy if need_residual else None, None, None, None, None


# ---- torch.ops.cgpt -----------------------------------------------------------------------------


def _run(x, weight, bias, residual, activation, weight_layout, dropout_p, seed, keep_pre, backend):
    kernel, _ = backends.implementation("gemm", backend)
    if 1 not in weight.stride():  # kernels read a transposed view in place
        weight = dense_last(weight)
    bias = bias if bias is None else dense_last(bias)
    residual = residual if residual is None else as_rows(residual)
    keep_pre = keep_pre and activation is not None
    product = as_rows(x), weight, bias
    how = activation, weight_layout
    if backend == "cpu" and (keep_pre or dropout_p > 0.0):
        drawn = 0 if seed is None else int(seed)
        y, pre = _forward_training(*product, residual, *how, dropout_p, drawn, keep_pre)
    else:
        # Other backends' kernels drop nothing: the mask and what follows it are torch's own.
        late = residual if dropout_p > 0.0 else None
        residual = None if dropout_p > 0.0 else residual
        with_pre = backends.own("gemm", backend, "gemm_fwd_with_pre")
        if not keep_pre:
            y, pre = _forward(kernel, *product, residual, *how), None
        elif with_pre:
            y, pre = with_pre(*product, residual, *how)
        else:
            y, pre = _forward_with_pre(kernel, *product, residual, *how)
        y = reference.dropout(y, dropout_p, seed)
        y = y if late is None else y + late
    return y.view((*x.shape[:-1], y.shape[1])), x.new_empty(0) if pre is None else pre


def _fake(x, weight, bias, residual, activation, weight_layout, dropout_p, seed, keep_pre, backend):
    N = weight.shape[1 if weight_layout == "kn" else 0]
    y = x.new_empty(*x.shape[:-1], N)
    kept = keep_pre and activation is not None
    return y, x.new_empty(prod(x.shape[:-1]), N) if kept else x.new_empty(0)


def _save(ctx, inputs, output):
    x, weight, bias, _, *how, seed, ctx.keep_pre, ctx.backend = inputs
    pre = output[1]
    ctx.mark_non_differentiable(pre)
    ctx.save_for_backward(x, weight, bias, pre, seed)
    ctx.options = how  # activation, weight_layout, dropout_p


def _backward(ctx, dy, dpre):
    x, weight, bias, pre, seed = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    if ctx.options[0] is not None and not ctx.keep_pre:
        raise RuntimeError(
            "gemm: torch.ops.cgpt.gemm needs keep_pre=True to give gradients through an activation"
        )
    options = *ctx.options, seed, need, ctx.backend
    grads = _gemm_bwd_op(dy, x, weight, bias, pre, *options)
    dx, dweight, dbias = (g if n else None for g, n in zip(grads, need, strict=True))
    dresidual = dy if ctx.needs_input_grad[3] else None
    return dx, dweight, dbias, dresidual, *[None] * 6


def _run_bwd(dy, x, weight, bias, pre, activation, weight_layout, dropout_p, seed, need, backend):
    tensors, how = (x, weight, bias, pre), (activation, weight_layout)
    if backend == "cpu":
        return gemm_bwd_cpu(dy, *tensors, *how, dropout_p, seed, need)
    own = backends.own("gemm", backend, "gemm_bwd")
    if own is not None:
        return own(reference.dropout(dy, dropout_p, seed), *tensors, *how, need)
    return gemm_bwd(dy, *tensors, *how, dropout_p, seed, need)


def _fake_bwd(dy, x, weight, bias, pre, activation, weight_layout, dropout_p, seed, need, backend):
    return (
        x.new_empty(x.shape if need[0] else 0),
        weight.new_empty(weight.shape if need[1] else 0),
        bias.new_empty(bias.shape) if need[2] and bias is not None else weight.new_empty(0),
    )


def _autocast(device_type, x, weight, bias, residual, *rest):
    return (*cast(autocast_dtype(device_type), x, weight, bias, residual), *rest)


_gemm_op = define(
    "gemm(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str? activation,"
    " str weight_layout, float dropout_p, Tensor? seed, bool keep_pre, str backend)"
    " -> (Tensor y, Tensor pre)",
    _run,
    _fake,
    save=_save,
    backward=_backward,
    autocast=_autocast,
)
_gemm_bwd_op = define(
    "gemm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor pre, str? activation,"
    " str weight_layout, float dropout_p, Tensor? seed, bool[3] need, str backend)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _run_bwd,
    _fake_bwd,
)

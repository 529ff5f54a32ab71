"""attention: contract, checks, autograd, registration.

Letters: B batch, H heads, S_q queries, S_k keys, D head size, T the dtype of q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends, checks
from ..dispatch import (
    PLAIN,
    REFUSALS,
    any_numpy,
    autocast_dtype,
    cast,
    choose,
    define,
    dense_last,
    once_differentiable,
    undisturbed,
    with_numpy,
)
from ..philox import SEED_END, check_dropout
from . import reference
from .backward import attention_bwd, like


def _shape_class(tensors: tuple) -> str:
    """A step of decoding or more queries, by the width of heads."""
    q = tensors[0]
    width = "D <= 64" if q.shape[3] <= 64 else "D <= 128" if q.shape[3] <= 128 else "D > 128"
    return f"few queries, {width}" if q.shape[2] <= 16 else width


ATTENTION = backends.Op(
    "attention", "attention", "attention_fwd", first="q", shape_class=_shape_class
)

_lean = backends.lean_kernels("attention")
_empty_like = torch.empty_like  # the look-up in torch's namespace costs 0.1 us a call


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T * scale + attn_bias - alibi) v, never holding the S_q x S_k matrix.

    A query that sees no key gives zeros, and zero gradients. Double backward is offered by backend
    "eager" only.

    Args:
        q: [B, H, S_q, D], T one of fp32, bf16, fp16 (fp64 on backend "eager").
        k, v: [B, H, S_k, D], T. Strided views are read in place when the last stride is 1. NumPy
            arrays are accepted everywhere.
        causal: key j is visible to query i iff j <= i + S_k - S_q (aligned bottom-right, so that
            the last query sees all keys, as a KV cache needs it).
        key_padding_mask: [B, S_k], bool, True marks padding (ignored), as in
            torch.nn.MultiheadAttention.
        attn_bias: broadcastable to [B, H, S_q, S_k]. T or fp32: added to the scaled logits, and
            differentiable. bool: True keeps, as the attn_mask of scaled_dot_product_attention.
        alibi_slopes: [H], fp32; logits -= slope * |i + S_k - S_q - j|. Not differentiable.
        scale: default 1 / sqrt(D).
        dropout_p: probability in [0, 1) of dropping each attention weight, applied in every mode;
            pass 0.0 in evaluation.
        seed: int in [0, 2^63) that fixes the dropout mask on every backend, bit for bit; None draws
            one from torch's default CPU generator, so torch.manual_seed governs it.
        backend: "auto" or a name; a name runs or raises.
    Returns:
        [B, H, S_q, D] in T, in memory ordered as q is (so that a q that is a view of [B, S, H, D]
        gives an output whose transpose(1, 2) is contiguous).
    Raises:
        ValueError, TypeError: before any memory is touched, naming argument, expected and got.
    """
    if (
        type(q) in PLAIN
        and type(k) in PLAIN
        and type(v) in PLAIN
        and (key_padding_mask is None or type(key_padding_mask) in PLAIN)
        and (attn_bias is None or type(attn_bias) in PLAIN)
        and (alibi_slopes is None or type(alibi_slopes) in PLAIN)
        and undisturbed()
        and q.is_cpu
    ):
        try:
            kernel = _lean.get((backend, q.dtype))
            if kernel is not None and q.ndim == 4 and dropout_p == 0.0 and seed is None:
                if scale is None:
                    scale = q.shape[3] ** -0.5 if q.shape[3] else 1.0
                if torch.is_grad_enabled() and (
                    q.requires_grad
                    or k.requires_grad
                    or v.requires_grad
                    or (attn_bias is not None and attn_bias.requires_grad)
                    or (alibi_slopes is not None and alibi_slopes.requires_grad)
                ):
                    _no_alibi_grad(alibi_slopes)
                    return _Attention.apply(
                        kernel, q, k, v, key_padding_mask, attn_bias, alibi_slopes,
                        scale, causal, 0.0, None,
                    )  # fmt: skip
                if attn_bias is not None:
                    attn_bias = _expand(attn_bias, q, k)
                out = _empty_like(q)  # keeps the order of q's dimensions in memory
                kernel(
                    q, k, v, key_padding_mask, attn_bias, alibi_slopes, out, None,
                    scale, causal, 0.0, 0,
                )  # fmt: skip
                return out
        except REFUSALS:
            pass  # the general path says why, or copies strides the kernel cannot read
    return _general(
        q, k, v, causal, key_padding_mask, attn_bias, alibi_slopes, scale, dropout_p, seed, backend
    )


def _no_alibi_grad(alibi_slopes):
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise ValueError(
            "attention: alibi_slopes must not require a gradient, none is offered; "
            "pass alibi_slopes.detach(), or the slopes as attn_bias"
        )


def _check(q, k, v, causal, key_padding_mask, attn_bias, alibi_slopes, scale, dropout_p, seed):
    op = "attention"
    for name, value in (("q", q), ("k", k), ("v", v)):
        checks.is_tensor(op, name, value)
    given = {
        "q": q,
        "k": k,
        "v": v,
        "key_padding_mask": key_padding_mask,
        "attn_bias": attn_bias,
        "alibi_slopes": alibi_slopes,
    }
    for name in ("key_padding_mask", "attn_bias", "alibi_slopes"):
        checks.is_tensor(op, name, given[name], optional=True)
    checks.strided(op, given)
    checks.has_dtype(op, "q", q, *checks.FLOATING)
    checks.has_rank(op, "q", q, 4, "(B, H, S_q, D)")
    B, H, S_q, D = q.shape
    checks.has_dtype(op, "k", k, q.dtype, why=" as q")
    checks.has_dtype(op, "v", v, q.dtype, why=" as q")
    checks.has_rank(op, "k", k, 4, "(B, H, S_k, D)")
    S_k = k.shape[2]
    checks.has_shape(op, "k", k, (B, H, S_k, D), "(B, H, S_k, D)")
    checks.has_shape(op, "v", v, (B, H, S_k, D), "(B, H, S_k, D)")
    if key_padding_mask is not None:
        checks.has_dtype(op, "key_padding_mask", key_padding_mask, torch.bool)
        checks.has_shape(op, "key_padding_mask", key_padding_mask, (B, S_k), "(B, S_k)")
    if attn_bias is not None:
        widest = q.dtype if q.dtype == torch.float64 else torch.float32
        allowed = (q.dtype, widest, torch.bool)
        checks.has_dtype(op, "attn_bias", attn_bias, *allowed, why=" beside this q")
        checks.broadcasts_to(op, "attn_bias", attn_bias, (B, H, S_q, S_k), "(B, H, S_q, S_k)")
    if alibi_slopes is not None:
        checks.has_dtype(op, "alibi_slopes", alibi_slopes, torch.float32)
        checks.has_shape(op, "alibi_slopes", alibi_slopes, (H,), "(H,)")
        _no_alibi_grad(alibi_slopes)
    checks.same_device(op, "q", given)
    checks.is_choice(op, "causal", causal, (True, False))
    checks.is_number(op, "scale", scale, optional=True)
    check_dropout(op, dropout_p, seed)


def _general(
    q, k, v, causal, key_padding_mask, attn_bias, alibi_slopes, scale, dropout_p, seed, backend
):
    """The way for dropout and for everything but plain tensors in plain eager on the CPU."""
    tensors = (q, k, v, key_padding_mask, attn_bias, alibi_slopes)
    if any_numpy(*tensors):
        return with_numpy(
            attention,
            q,
            k,
            v,
            causal=causal,
            key_padding_mask=key_padding_mask,
            attn_bias=attn_bias,
            alibi_slopes=alibi_slopes,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
            backend=backend,
        )
    if isinstance(q, Tensor) and autocast_dtype(q.device.type) is not None:
        q, k, v, attn_bias = _autocast(q.device.type, q, k, v, attn_bias)
    _check(q, k, v, causal, key_padding_mask, attn_bias, alibi_slopes, scale, dropout_p, seed)
    chosen = choose("attention", backend, (q, k, v, key_padding_mask, attn_bias, alibi_slopes))
    if scale is None:
        scale = max(q.shape[3], 1) ** -0.5
    if dropout_p == 0.0:
        seed = None  # nothing is drawn, and torch's generator stays where it is
    elif seed is None:
        # A tensor, so that a compiled graph draws anew at each call.
        seed = torch.randint(SEED_END - 1, (), dtype=torch.int64)
    else:
        seed = torch.tensor(seed, dtype=torch.int64)
    masks = (key_padding_mask, attn_bias, alibi_slopes)
    options = (scale, causal, dropout_p, seed)
    if chosen == "eager":
        return reference.attention_fwd(q, k, v, *masks, *options)[0]
    return _attention_op(q, k, v, *masks, *options, chosen)[0]


def _expand(attn_bias, q, k):
    return attn_bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def _forward(
    kernel, q, k, v, key_padding_mask, attn_bias, alibi_slopes, scale, causal, dropout_p, seed, lse,
    *row_stats,
):  # fmt: skip
    """out [B, H, S_q, D]; fills lse and row_stats, which the cpu kernel takes, where given."""
    out = like(q)
    if q.stride(3) != 1:
        q = dense_last(q)
    if k.stride(3) != 1:
        k = dense_last(k)
    if v.stride(3) != 1:
        v = dense_last(v)
    if attn_bias is not None:
        attn_bias = _expand(attn_bias, q, k)
    kernel(
        q, k, v, key_padding_mask, attn_bias, alibi_slopes, out, lse, scale, causal, dropout_p,
        seed, *row_stats,
    )  # fmt: skip
    return out


def _row_stats(q):
    return q.new_empty((*q.shape[:3], 2), dtype=torch.float32)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, kernel, q, k, v, key_padding_mask, attn_bias, alibi_slopes, scale, causal, dropout_p,
        seed,
    ):  # fmt: skip
        masks = key_padding_mask, attn_bias, alibi_slopes
        row_stats = _row_stats(q)
        out = _forward(kernel, q, k, v, *masks, scale, causal, dropout_p, 0, None, row_stats)
        ctx.save_for_backward(q, k, v, out, row_stats, *masks)
        ctx.options = scale, causal, dropout_p, seed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        _, need_q, need_k, need_v, _, need_bias, *_ = ctx.needs_input_grad
        dq, dk, dv, dbias = attention_bwd(dout, *ctx.saved_tensors, *ctx.options, need_bias)
        return (
            None,
            dq if need_q else None,
            dk if need_k else None,
            dv if need_v else None,
            None,
            dbias if need_bias else None,
            *[None] * 5,
        )


# ---- torch.ops.cgpt -----------------------------------------------------------------------------


def _run(
    q, k, v, key_padding_mask, attn_bias, alibi_slopes, scale, causal, dropout_p, seed, backend
):
    kernel, _ = backends.implementation("attention", backend)
    if key_padding_mask is not None:
        key_padding_mask = dense_last(key_padding_mask)
    if alibi_slopes is not None:
        alibi_slopes = dense_last(alibi_slopes)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    masks = key_padding_mask, attn_bias, alibi_slopes
    drawn = seed if backends.is_traced(backend) else 0 if seed is None else int(seed)
    row_stats = (_row_stats(q),) if backend == "cpu" else ()
    out = _forward(kernel, q, k, v, *masks, scale, causal, dropout_p, drawn, lse, *row_stats)
    return out, lse, *(row_stats or (q.new_empty(0, dtype=torch.float32),))


def _fake(
    q, k, v, key_padding_mask, attn_bias, alibi_slopes, scale, causal, dropout_p, seed, backend
):
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    row_stats = _row_stats(q) if backend == "cpu" else q.new_empty(0, dtype=torch.float32)
    return like(q), lse, row_stats


def _save(ctx, inputs, output):
    q, k, v, *masks, scale, causal, dropout_p, seed, ctx.backend = inputs
    out, lse, row_stats = output
    _no_alibi_grad(masks[2])
    ctx.mark_non_differentiable(lse, row_stats)
    ctx.save_for_backward(q, k, v, out, lse, row_stats, *masks, seed)
    ctx.options = scale, causal, dropout_p


def _backward(ctx, dout, dlse, drow_stats):
    *tensors, seed = ctx.saved_tensors
    need_q, need_k, need_v, _, need_bias = ctx.needs_input_grad[:5]
    options = *ctx.options, seed, need_bias, ctx.backend
    dq, dk, dv, dbias = _attention_bwd_op(dout, *tensors, *options)
    return (
        dq if need_q else None,
        dk if need_k else None,
        dv if need_v else None,
        None,
        dbias if need_bias else None,
        *[None] * 6,
    )


def _run_bwd(dout, q, k, v, out, lse, row_stats, *args):
    *args, backend = args
    own = backends.own("attention", backend, "attention_bwd")
    if own is not None:
        return own(dout, q, k, v, out, lse, *args)
    return attention_bwd(dout, q, k, v, out, row_stats if row_stats.numel() else None, *args)


def _fake_bwd(
    dout, q, k, v, out, lse, row_stats, key_padding_mask, attn_bias, alibi_slopes, scale, causal,
    dropout_p, seed, need_bias, backend,
):  # fmt: skip
    dbias = attn_bias.new_empty(attn_bias.shape) if need_bias else q.new_empty(0)
    own = backends.own("attention", backend, "attention_bwd")
    allocate = like if own is None else lambda t: t.new_empty(t.shape)
    return *map(allocate, (q, k, v)), dbias


def _autocast(device_type, q, k, v, attn_bias):
    narrow = autocast_dtype(device_type)
    q, k, v = cast(narrow, q, k, v)
    if attn_bias is not None and attn_bias.dtype != torch.float32:  # fp32 is exact beside any T
        (attn_bias,) = cast(narrow, attn_bias)
    return q, k, v, attn_bias


def _autocast_args(device_type, q, k, v, key_padding_mask, attn_bias, *rest):
    q, k, v, attn_bias = _autocast(device_type, q, k, v, attn_bias)
    return (q, k, v, key_padding_mask, attn_bias, *rest)


_attention_op = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, Tensor? attn_bias,"
    " Tensor? alibi_slopes, float scale, bool causal, float dropout_p, Tensor? seed, str backend)"
    " -> (Tensor out, Tensor lse, Tensor row_stats)",
    _run,
    _fake,
    save=_save,
    backward=_backward,
    autocast=_autocast_args,
)
_attention_bwd_op = define(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor row_stats, Tensor? key_padding_mask, Tensor? attn_bias, Tensor? alibi_slopes,"
    " float scale, bool causal, float dropout_p, Tensor? seed, bool need_bias, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    _run_bwd,
    _fake_bwd,
)

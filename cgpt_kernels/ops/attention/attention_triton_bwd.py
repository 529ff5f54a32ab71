"""Gradients of attention in Triton: one pass per output, no atomics, the same bits on every run.

rows: per query, what turns a logit into a probability, and delta = sum_j P dP.
keys: a program holds BLOCK_N keys and walks through the queries that see them: dk, dv.
queries: a program holds BLOCK_M queries and walks through the keys they see: dq.
bias: a program holds a tile of the gradient of attn_bias and walks through what shares it.

P = exp(logits - lse) and delta = sum(do * out) cost nothing but one pass over do and out. In fp32
and under an added bias that is not exact enough: ulp(lse) is seen in P, lse is no sum where
finfo.min swallows it, and an output rounded to bf16 leaves dlogits whose rows do not sum to 0,
which the gradient of a bias shows. There `rows` takes maximum, sum and delta anew from the logits.

Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 2. Letters: as in attention_triton.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_substrate import launch
from ...triton_substrate.device import LOG2E, dot, dot_transposed, narrow, precision
from ..dispatch import dense_last
from .attention_triton_dq import attention_bias_kernel, attention_queries_kernel
from .triton_call import bias_kind, natural, seed_words, shape_class, threshold
from .triton_tile import keep_tile, keys_there, load_tile, logits_tile, probabilities, seed_of


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
def attention_rows_kernel(
    q, k, v, dout, out, lse, padding, bias, slopes, tops, shares, deltas, seed_low, seed_high,
    H, S_q, S_k, scale, kept, threshold,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_db, stride_dh, stride_ds,
    stride_ob, stride_oh, stride_os, stride_pb, stride_bb, stride_bh, stride_bi, stride_bj,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, there = i.to(tl.int64), i < S_q
    at = head.to(tl.int64) * S_q + rows
    do = load_tile(dout + b * stride_db + h * stride_dh, rows, stride_ds, there, D, BLOCK_D)
    if not NATURAL:
        o = load_tile(out + b * stride_ob + h * stride_oh, rows, stride_os, there, D, BLOCK_D)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        sums = tl.load(lse + at, mask=there, other=0.0)
        # exp2(s - inf) is 0 in a row that sees no key
        tl.store(tops + at, tl.where(sums == float("-inf"), float("inf"), sums * LOG2E), mask=there)
        tl.store(deltas + at, delta, mask=there)
        return
    qt = load_tile(q + b * stride_qb + h * stride_qh, rows, stride_qs, there, D, BLOCK_D)
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    if BIAS != "none":
        bias += b * stride_bb + h * stride_bh
    if HAS_PADDING:
        padding += b * stride_pb
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes + h)
    seed = seed_of(seed_low, seed_high)
    high = S_k
    if CAUSAL:
        high = min(S_k, max(0, (block + 1) * BLOCK_M + (S_k - S_q)))
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, high, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        real = keys_there(padding, j, S_k, HAS_PADDING)
        kt = load_tile(k, j.to(tl.int64), stride_ks, real, D, BLOCK_D)
        vt = load_tile(v, j.to(tl.int64), stride_vs, real, D, BLOCK_D)
        zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        s = logits_tile(
            dot(qt, tl.trans(kt), zero, PRECISION), i[:, None], j[None, :], bias, padding, slope,
            S_q, S_k, stride_bi, stride_bj, scale, CAUSAL, BIAS, HAS_PADDING, HAS_ALIBI, True,
        )  # fmt: skip
        dp = dot(do, tl.trans(vt), zero, PRECISION)
        if DROPOUT:
            first = at * S_k
            keep = keep_tile(first, start, seed, threshold, BLOCK_N, ALIGNED)
            dp = tl.where(keep, dp * kept, 0.0)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp(s - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(p, 1)
        weighted = weighted * shrink + tl.sum(p * dp, 1)
        top = higher
    seen = total > 0
    share = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)
    tl.store(tops + at, tl.where(seen, top, 0.0), mask=there)
    tl.store(shares + at, share, mask=there)
    tl.store(deltas + at, weighted * share, mask=there)


@triton.jit
def _add_keys(
    dk, dv, kt, vt, q, dout, bias, padding, slope, tops, shares, deltas, low, high, j, start_j,
    S_q, S_k, first_row, stride_qs, stride_ds, stride_bi, stride_bj, scale, kept, seed, threshold,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, NATURAL: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv after the queries low .. high - 1; tiles are transposed, [BLOCK_N, BLOCK_M].

    Rows of keys beyond S_k may hold anything: they touch no other row and are not stored.
    """
    for start in range(low, high, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        there = i < S_q
        qt = load_tile(q, i.to(tl.int64), stride_qs, there, D, BLOCK_D)
        do = load_tile(dout, i.to(tl.int64), stride_ds, there, D, BLOCK_D)
        # queries beyond S_q get P = 0
        top = tl.load(tops + i, mask=there, other=0.0 if NATURAL else float("inf"))[None, :]
        share = tl.load(shares + i, mask=there, other=0.0)[None, :] if NATURAL else top
        delta = tl.load(deltas + i, mask=there, other=0.0)[None, :]
        s = logits_tile(
            dot_transposed(kt, qt, PRECISION), i[None, :], j[:, None], bias, padding, slope,
            S_q, S_k, stride_bi, stride_bj, scale, CAUSAL, BIAS, HAS_PADDING, HAS_ALIBI, MASKED,
        )  # fmt: skip
        p = probabilities(s, top, share, NATURAL)
        dp = dot_transposed(vt, do, PRECISION)
        dropped = p
        if DROPOUT:
            first = (first_row + i) * S_k
            keep = tl.trans(keep_tile(first, start_j, seed, threshold, BLOCK_N, ALIGNED))
            dropped = tl.where(keep, p * kept, 0.0)
            dp = tl.where(keep, dp * kept, 0.0)
        dv = dot(narrow(dropped, do.dtype), do, dv, PRECISION)
        dlogits = p * (dp - delta)
        dk = dot(narrow(dlogits, qt.dtype), qt, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
def attention_keys_kernel(
    q, k, v, dout, padding, bias, slopes, tops, shares, deltas, dk, dv, seed_low, seed_high,
    H, S_q, S_k, scale, kept, threshold,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_db, stride_dh, stride_ds,
    stride_pb, stride_bb, stride_bh, stride_bi, stride_bj,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk, dv [B, H, S_k, D], contiguous."""
    start_j = tl.program_id(0) * BLOCK_N
    head = tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    j = start_j + tl.arange(0, BLOCK_N)
    first_row = head.to(tl.int64) * S_q
    q += b * stride_qb + h * stride_qh
    dout += b * stride_db + h * stride_dh
    tops += first_row
    deltas += first_row
    if NATURAL:
        shares += first_row
    if BIAS != "none":
        bias += b * stride_bb + h * stride_bh
    if HAS_PADDING:
        padding += b * stride_pb
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes + h)
        if not NATURAL:
            slope *= LOG2E
    real = keys_there(padding, j, S_k, HAS_PADDING)
    kt = load_tile(k + b * stride_kb + h * stride_kh, j.to(tl.int64), stride_ks, real, D, BLOCK_D)
    vt = load_tile(v + b * stride_vb + h * stride_vh, j.to(tl.int64), stride_vs, real, D, BLOCK_D)
    low = 0
    middle = 0  # from here on every query sees all keys of the block
    if CAUSAL:
        low = max(0, start_j - (S_k - S_q)) // BLOCK_M * BLOCK_M
        edge = max(0, start_j + BLOCK_N - 1 - (S_k - S_q))
        middle = min(S_q, (edge + BLOCK_M - 1) // BLOCK_M * BLOCK_M)
    inner = scale if NATURAL else scale * LOG2E
    seed = seed_of(seed_low, seed_high)
    dkt = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dvt = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dkt, dvt = _add_keys(
        dkt, dvt, kt, vt, q, dout, bias, padding, slope, tops, shares, deltas,
        low, middle, j, start_j, S_q, S_k, first_row, stride_qs, stride_ds, stride_bi, stride_bj,
        inner, kept, seed, threshold, CAUSAL, BIAS, HAS_PADDING, HAS_ALIBI, DROPOUT, ALIGNED,
        NATURAL, True, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    dkt, dvt = _add_keys(
        dkt, dvt, kt, vt, q, dout, bias, padding, slope, tops, shares, deltas,
        middle, S_q, j, start_j, S_q, S_k, first_row, stride_qs, stride_ds, stride_bi, stride_bj,
        inner, kept, seed, threshold, CAUSAL, BIAS, HAS_PADDING, HAS_ALIBI, DROPOUT, ALIGNED,
        NATURAL, False, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    at = (head.to(tl.int64) * S_k + j)[:, None] * D + d[None, :]
    there = (j < S_k)[:, None] & (d < D)[None, :]
    tl.store(dk + at, narrow(dkt * scale, dk.dtype.element_ty), mask=there)
    tl.store(dv + at, narrow(dvt, dv.dtype.element_ty), mask=there)


# ---- launch -------------------------------------------------------------------------------------


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_padding_mask: Tensor | None,
    attn_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: int | Tensor | None,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the gradient of attn_bias (an empty tensor unless need_bias).

    Args:
        dout, q, out: [B, H, S_q, D] in T.   k, v: [B, H, S_k, D].   lse: [B, H, S_q], fp32.
        attn_bias: as passed by the user, not expanded: its gradient has its shape.
    """
    (B, H, S_q, D), S_k = q.shape, k.shape[2]
    D = int(D)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.numel() == 0 or k.numel() == 0:  # nothing sees anything
        dbias = attn_bias.new_zeros(attn_bias.shape) if need_bias else q.new_empty(0)
        return dq.zero_(), *(torch.zeros_like(t).contiguous() for t in (k, v)), dbias
    dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k, v))
    q, k, v, dout = (dense_last(t) for t in (q, k, v, dout))
    padding = None if key_padding_mask is None else dense_last(key_padding_mask)
    slopes = None if alibi_slopes is None else dense_last(alibi_slopes)
    bias = None if attn_bias is None else attn_bias.expand(B, H, S_q, S_k)
    kind, words = bias_kind(bias), seed_words(seed, q)
    base_e = natural(q, kind)
    # three arrays, not one: traced, what writes a view of an array copies the array
    shape = (B, H, S_q)
    tops, shares, deltas = (q.new_empty(shape, dtype=torch.float32) for _ in range(3))
    sizes = S_q, S_k, float(scale), 1.0 / (1.0 - dropout_p), threshold(dropout_p)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    masks = (
        0 if padding is None else padding.stride(0),
        *((0, 0, 0, 0) if bias is None else bias.stride()),
    )
    options = (
        causal, kind, padding is not None, slopes is not None, dropout_p > 0.0, S_k % 4 == 0,
        base_e, precision(q.dtype), D, max(16, triton.next_power_of_2(D)),
    )  # fmt: skip
    which = shape_class(q.element_size(), D, kind, dropout_p)

    def config(kernel):
        return launch.config(f"attention_{kernel}", which, q.device.index)

    chosen = config("rows")
    grid = launch.cdiv(S_q, chosen["BLOCK_M"]), B * H
    tensors = q, k, v, dout, out, lse, padding, bias, slopes, tops, shares, deltas
    numbers = H, *sizes, *strides, *out.stride()[:3], *masks, *options
    launch.run(attention_rows_kernel, grid, tensors, numbers, chosen, words)
    given = (q, k, v, dout, padding, bias, slopes, tops, shares, deltas)
    chosen = config("keys")
    grid = launch.cdiv(S_k, chosen["BLOCK_N"]), B * H
    numbers = H, *sizes, *strides, *masks, *options
    launch.run(attention_keys_kernel, grid, (*given, dk, dv), numbers, chosen, words)
    chosen = config("queries")
    grid = launch.cdiv(S_q, chosen["BLOCK_M"]), B * H
    launch.run(attention_queries_kernel, grid, (*given, dq), numbers, chosen, words)
    if not need_bias:
        return dq, dk, dv, q.new_empty(0)
    four = (1,) * (4 - attn_bias.ndim) + tuple(attn_bias.shape)
    own_b, own_h = four[:2]
    which = "16 bit" if q.element_size() == 2 else "fp32"
    chosen = config("bias")
    dbias = q.new_empty((own_b, own_h, S_q, S_k), dtype=torch.float32)
    tiles_n, tiles_m = launch.cdiv(S_k, chosen["BLOCK_N"]), launch.cdiv(S_q, chosen["BLOCK_M"])
    grid = tiles_n, tiles_m, own_b * own_h
    numbers = own_h, B // own_b, H // own_h, *numbers
    launch.run(attention_bias_kernel, grid, (*given, dbias), numbers, chosen, words)
    # what is shared along queries or keys is added up last
    return dq, dk, dv, dbias.sum_to_size(four).view(attn_bias.shape).to(attn_bias.dtype)

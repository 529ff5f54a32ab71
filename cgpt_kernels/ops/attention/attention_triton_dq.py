"""Gradients of attention by queries: dq and dbias; attention_triton_bwd.py says how."""

import triton
import triton.language as tl

from ...triton_substrate.device import LOG2E, dot, narrow
from .triton_tile import keep_tile, keys_there, load_tile, logits_tile, probabilities, seed_of


@triton.jit
def _dlogits(
    qt, do, kt, vt, i, j, bias, padding, slope, top, share, delta, start_j, S_q, S_k, first,
    stride_bi, stride_bj, scale, kept, seed, threshold,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, NATURAL: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P * (dP - delta) of the tile of queries i and keys j, fp32 [BLOCK_M, BLOCK_N]."""
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    s = logits_tile(
        dot(qt, tl.trans(kt), zero, PRECISION), i[:, None], j[None, :], bias, padding, slope,
        S_q, S_k, stride_bi, stride_bj, scale, CAUSAL, BIAS, HAS_PADDING, HAS_ALIBI, MASKED,
    )  # fmt: skip
    p = probabilities(s, top[:, None], share[:, None], NATURAL)
    dp = dot(do, tl.trans(vt), zero, PRECISION)
    if DROPOUT:
        keep = keep_tile(first, start_j, seed, threshold, BLOCK_N, ALIGNED)
        dp = tl.where(keep, dp * kept, 0.0)
    return p * (dp - delta[:, None])


@triton.jit
def _add_queries(
    dq, qt, do, k, v, bias, padding, slope, top, share, delta, low, high, i, S_q, S_k, first,
    stride_ks, stride_vs, stride_bi, stride_bj, scale, kept, seed, threshold,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, NATURAL: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq after the keys low .. high - 1."""
    for start in range(low, high, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        real = keys_there(padding, j, S_k, HAS_PADDING)
        kt = load_tile(k, j.to(tl.int64), stride_ks, real, D, BLOCK_D)
        vt = load_tile(v, j.to(tl.int64), stride_vs, real, D, BLOCK_D)
        dlogits = _dlogits(
            qt, do, kt, vt, i, j, bias, padding, slope, top, share, delta, start, S_q, S_k, first,
            stride_bi, stride_bj, scale, kept, seed, threshold, CAUSAL, BIAS, HAS_PADDING,
            HAS_ALIBI, DROPOUT, ALIGNED, NATURAL, MASKED, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        dq = dot(narrow(dlogits, kt.dtype), kt, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
def attention_queries_kernel(
    q, k, v, dout, padding, bias, slopes, tops, shares, deltas, dq, seed_low, seed_high,
    H, S_q, S_k, scale, kept, threshold,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_db, stride_dh, stride_ds,
    stride_pb, stride_bb, stride_bh, stride_bi, stride_bj,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq [B, H, S_q, D], contiguous."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, there = i.to(tl.int64), i < S_q
    at = head.to(tl.int64) * S_q + rows
    qt = load_tile(q + b * stride_qb + h * stride_qh, rows, stride_qs, there, D, BLOCK_D)
    do = load_tile(dout + b * stride_db + h * stride_dh, rows, stride_ds, there, D, BLOCK_D)
    top = tl.load(tops + at, mask=there, other=0.0 if NATURAL else float("inf"))
    share = tl.load(shares + at, mask=there, other=0.0) if NATURAL else top
    delta = tl.load(deltas + at, mask=there, other=0.0)
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    if BIAS != "none":
        bias += b * stride_bb + h * stride_bh
    if HAS_PADDING:
        padding += b * stride_pb
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes + h)
        if not NATURAL:
            slope *= LOG2E
    inner = scale if NATURAL else scale * LOG2E
    seed = seed_of(seed_low, seed_high)
    high = S_k
    plain = S_k
    if CAUSAL:
        high = min(S_k, max(0, (block + 1) * BLOCK_M + (S_k - S_q)))
        plain = min(S_k, max(0, block * BLOCK_M + (S_k - S_q) + 1))
    middle = plain // BLOCK_N * BLOCK_N
    dqt = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dqt = _add_queries(
        dqt, qt, do, k, v, bias, padding, slope, top, share, delta, 0, middle, i, S_q, S_k,
        at * S_k, stride_ks, stride_vs, stride_bi, stride_bj, inner, kept, seed, threshold,
        CAUSAL, BIAS, HAS_PADDING, HAS_ALIBI, DROPOUT, ALIGNED, NATURAL, False,
        D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    dqt = _add_queries(
        dqt, qt, do, k, v, bias, padding, slope, top, share, delta, middle, high, i, S_q, S_k,
        at * S_k, stride_ks, stride_vs, stride_bi, stride_bj, inner, kept, seed, threshold,
        CAUSAL, BIAS, HAS_PADDING, HAS_ALIBI, DROPOUT, ALIGNED, NATURAL, True,
        D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    mask = there[:, None] & (d < D)[None, :]
    tl.store(dq + at[:, None] * D + d[None, :], narrow(dqt * scale, dq.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
def attention_bias_kernel(
    q, k, v, dout, padding, bias, slopes, tops, shares, deltas, dbias, seed_low, seed_high,
    bias_heads, over_b, over_h, H, S_q, S_k, scale, kept, threshold,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_db, stride_dh, stride_ds,
    stride_pb, stride_bb, stride_bh, stride_bi, stride_bj,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dbias [bias batch, bias heads, S_q, S_k], fp32: dlogits of the over_b entries of the batch
    and over_h heads that share an element, added up in their order."""
    start_j = tl.program_id(0) * BLOCK_N
    own = tl.program_id(2)
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = start_j + tl.arange(0, BLOCK_N)
    rows, there = i.to(tl.int64), i < S_q
    inner = scale if NATURAL else scale * LOG2E
    seed = seed_of(seed_low, seed_high)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, over_b * over_h):
        b = (own // bias_heads + step // over_h).to(tl.int64)
        h = (own % bias_heads + step % over_h).to(tl.int64)
        at = (b * H + h) * S_q + rows
        qt = load_tile(q + b * stride_qb + h * stride_qh, rows, stride_qs, there, D, BLOCK_D)
        do = load_tile(dout + b * stride_db + h * stride_dh, rows, stride_ds, there, D, BLOCK_D)
        masks = padding
        if HAS_PADDING:
            masks = padding + b * stride_pb
        real = keys_there(masks, j, S_k, HAS_PADDING)
        kt = load_tile(
            k + b * stride_kb + h * stride_kh, j.to(tl.int64), stride_ks, real, D, BLOCK_D
        )
        vt = load_tile(
            v + b * stride_vb + h * stride_vh, j.to(tl.int64), stride_vs, real, D, BLOCK_D
        )
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(slopes + h)
        top = tl.load(tops + at, mask=there, other=0.0)
        share = tl.load(shares + at, mask=there, other=0.0)
        delta = tl.load(deltas + at, mask=there, other=0.0)
        acc += _dlogits(
            qt, do, kt, vt, i, j, bias + b * stride_bb + h * stride_bh, masks, slope,
            top, share, delta, start_j, S_q, S_k, at * S_k, stride_bi, stride_bj, inner, kept,
            seed, threshold, CAUSAL, BIAS, HAS_PADDING, HAS_ALIBI, DROPOUT, ALIGNED, NATURAL, True,
            BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    at = (own.to(tl.int64) * S_q + rows)[:, None] * S_k + j[None, :]
    tl.store(dbias + at, acc, mask=there[:, None] & (j < S_k)[None, :])

"""attention in Triton: one pass over the keys with a running maximum and sum.

Forward: a program holds BLOCK_M queries and walks through the keys they may see, BLOCK_N at a time;
whole blocks below the causal edge skip the mask. (2 * S_q + 2 * S_k) * B * H * D * sizeof(T) bytes,
and k and v again per block of queries from L2; q, k, v and out may have any strides.
Few queries against many keys (a KV cache): the keys are cut into chunks, a program per chunk, and a
second kernel joins the parts. The cut depends on S_k alone, so a sequence gets the same bits
whatever else is in its batch.

Exponentials are taken in base 2, one instruction, with log2(e) folded into the scale; in fp32 and
under an added bias the base is e, because scaling the logits would round them once more, and
finfo.min * log2(e) overflows.

Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 1.
Letters: B batch, H heads, S_q queries, S_k keys, D head size, T the dtype of q.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_substrate import launch
from ...triton_substrate.device import LN2, LOG2E, dot, narrow, precision
from .attention_triton_bwd import attention_bwd  # noqa: F401  (looked up here)
from .triton_call import WIDEST, bias_kind, natural, seed_words, shape_class, threshold
from .triton_tile import keep_tile, logits_tile, seed_of

# Few queries against more keys than this are cut into chunks.
MANY_KEYS = 512


@triton.jit
def _attend(
    acc, total, top, q, k, v, bias, padding, slope, first, low, high, i,
    S_q, S_k, stride_ks, stride_vs, stride_bi, stride_bj, scale, seed, threshold,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, NATURAL: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc, total, top after the keys low .. high - 1; without MASKED all of them are visible."""
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    for start in range(low, high, BLOCK_N):
        j = start + n
        there = j < S_k
        if HAS_PADDING:  # what a masked key holds may be NaN, and 0 * NaN is no 0
            there = there & (tl.load(padding + j, mask=there, other=1) == 0)
        rows = j.to(tl.int64)
        if D == BLOCK_D and not (MASKED or HAS_PADDING):
            kt = tl.load(k + rows[None, :] * stride_ks + d[:, None])
            vt = tl.load(v + rows[:, None] * stride_vs + d[None, :])
        else:
            inside = d < D
            kt = tl.load(
                k + rows[None, :] * stride_ks + d[:, None],
                mask=there[None, :] & inside[:, None],
                other=0.0,
            )
            vt = tl.load(
                v + rows[:, None] * stride_vs + d[None, :],
                mask=there[:, None] & inside[None, :],
                other=0.0,
            )
        product = dot(q, kt, tl.zeros([q.shape[0], BLOCK_N], tl.float32), PRECISION)
        s = logits_tile(
            product, i[:, None], j[None, :], bias, padding, slope,
            S_q, S_k, stride_bi, stride_bj, scale, CAUSAL, BIAS, HAS_PADDING, HAS_ALIBI, MASKED,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        # a row that has seen no key yet: -inf - (-inf) would be NaN
        base = tl.where(higher == float("-inf"), 0.0, higher)
        if NATURAL:
            p = tl.exp(s - base[:, None])
            shrink = tl.exp(top - base)
        else:
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(keep_tile(first, start, seed, threshold, BLOCK_N, ALIGNED), p, 0.0)
        acc = dot(narrow(p, vt.dtype), vt, acc * shrink[:, None], PRECISION)
        top = higher
    return acc, total, top


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
def attention_fwd_kernel(
    q, k, v, padding, bias, slopes, out, lse, part, part_top, part_total, seed_low, seed_high,
    H, S_q, S_k, scale, kept, threshold,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os,
    stride_pb, stride_bb, stride_bh, stride_bi, stride_bj,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, NATURAL: tl.constexpr, HAS_LSE: tl.constexpr,
    SPLIT: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # the last blocks of queries see most keys under a causal mask: they start first
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    rows = i.to(tl.int64)
    q_there = (i < S_q)[:, None] & (d < D)[None, :]
    at = q + b * stride_qb + h * stride_qh + rows[:, None] * stride_qs + d[None, :]
    qt = tl.load(at, mask=q_there, other=0.0)
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
    if not NATURAL:
        scale *= LOG2E
    seed = seed_of(seed_low, seed_high)
    first = (head.to(tl.int64) * S_q + rows) * S_k

    low = 0
    high = S_k
    plain = S_k  # keys below it are visible to every query of the block
    if CAUSAL:
        high = min(S_k, max(0, (block + 1) * BLOCK_M + (S_k - S_q)))
        plain = min(S_k, max(0, block * BLOCK_M + (S_k - S_q) + 1))
    if SPLIT:
        low = tl.program_id(2) * CHUNK
        high = min(high, low + CHUNK)
        plain = min(plain, high)
    middle = max(low, plain // BLOCK_N * BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, total, top = _attend(
        acc, total, top, qt, k, v, bias, padding, slope, first, low, middle, i,
        S_q, S_k, stride_ks, stride_vs, stride_bi, stride_bj, scale, seed, threshold,
        CAUSAL, BIAS, HAS_PADDING, HAS_ALIBI, DROPOUT, ALIGNED, NATURAL, False,
        D, BLOCK_D, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, qt, k, v, bias, padding, slope, first, middle, high, i,
        S_q, S_k, stride_ks, stride_vs, stride_bi, stride_bj, scale, seed, threshold,
        CAUSAL, BIAS, HAS_PADDING, HAS_ALIBI, DROPOUT, ALIGNED, NATURAL, True,
        D, BLOCK_D, BLOCK_N, PRECISION,
    )  # fmt: skip
    if SPLIT:
        row = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + head) * S_q + rows
        tl.store(part + row[:, None] * D + d[None, :], acc, mask=q_there)
        tl.store(part_top + row, top, mask=i < S_q)
        tl.store(part_total + row, total, mask=i < S_q)
    else:
        result = (kept / tl.where(total > 0, total, 1.0))[:, None] * acc  # 0 where no key is seen
        at = out + b * stride_ob + h * stride_oh + rows[:, None] * stride_os + d[None, :]
        tl.store(at, narrow(result, out.dtype.element_ty), mask=q_there)
        if HAS_LSE:
            natural = top + tl.log(total) if NATURAL else (top + tl.log2(total)) * LN2
            tl.store(lse + head.to(tl.int64) * S_q + rows, natural, mask=i < S_q)


@triton.jit
def attention_join_kernel(
    part, part_top, part_total, out, lse, stride_chunk, H, S_q, chunks, kept,
    stride_ob, stride_oh, stride_os,
    NATURAL: tl.constexpr, HAS_LSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out and lse of one query from its parts, in the order of the chunks."""
    head = tl.program_id(0).to(tl.int64)
    row = head * S_q + tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    top = float("-inf")
    for chunk in range(0, chunks):
        at = chunk * stride_chunk + row
        higher = tl.maximum(top, tl.load(part_top + at))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        if NATURAL:
            old = tl.exp(top - base)
            new = tl.exp(tl.load(part_top + at) - base)
        else:
            old = tl.exp2(top - base)
            new = tl.exp2(tl.load(part_top + at) - base)
        acc = acc * old + tl.load(part + at * D + d, mask=d < D, other=0.0) * new
        total = total * old + tl.load(part_total + at) * new
        top = higher
    result = kept / tl.where(total > 0, total, 1.0) * acc
    at = out + (head // H) * stride_ob + (head % H) * stride_oh + tl.program_id(1) * stride_os + d
    tl.store(at, narrow(result, out.dtype.element_ty), mask=d < D)
    if HAS_LSE:
        natural = top + tl.log(total) if NATURAL else (top + tl.log2(total)) * LN2
        tl.store(lse + row, natural)


# ---- launch -------------------------------------------------------------------------------------


def unsupported(q: Tensor, *rest) -> str | None:
    """Why these kernels cannot take q, or None."""
    return f"heads are wider than {WIDEST}, got D = {q.shape[3]}" if q.shape[3] > WIDEST else None


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    attn_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: int | Tensor | None,
) -> None:
    """out = dropout(softmax(masked logits)) v; lse where given.

    Args:
        q, out: [B, H, S_q, D].   k, v: [B, H, S_k, D]; any strides but the last, which is 1.
        key_padding_mask: [B, S_k], bool, last stride 1.   attn_bias: [B, H, S_q, S_k], any strides.
        alibi_slopes: [H], fp32, contiguous.   lse: [B, H, S_q], fp32, contiguous.
    """
    (B, H, S_q, D), S_k = q.shape, k.shape[2]
    D = int(D)  # a traced size too becomes a constant of the kernel
    if out.numel() == 0:
        return
    few, bias = S_q <= 16, bias_kind(attn_bias)
    which = shape_class(q.element_size(), D, bias, dropout_p)
    if few:
        which = f"few queries, {shape_class(q.element_size(), D)}"
    chosen = dict(launch.config("attention_fwd", which, q.device.index))
    chunk = chosen.pop("CHUNK", 0)
    chunks = launch.cdiv(S_k, chunk) if few and S_k > MANY_KEYS else 1
    part = part_top = part_total = None
    if chunks > 1:
        part = q.new_empty((chunks, B, H, S_q, D), dtype=torch.float32)
        # two arrays, not one of twice the size: traced, what writes a view of an array copies it
        shape = (chunks, B, H, S_q)
        part_top, part_total = (q.new_empty(shape, dtype=torch.float32) for _ in range(2))
    base_e, block_d = natural(q, bias), max(16, triton.next_power_of_2(D))
    kept = 1.0 / (1.0 - dropout_p)
    grid = (launch.cdiv(S_q, chosen["BLOCK_M"]), B * H, chunks)
    masks = key_padding_mask, attn_bias, alibi_slopes
    numbers = (
        H, S_q, S_k, float(scale), kept, threshold(dropout_p),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        0 if key_padding_mask is None else key_padding_mask.stride(0),
        *((0, 0, 0, 0) if attn_bias is None else attn_bias.stride()),
        causal, bias, key_padding_mask is not None, alibi_slopes is not None,
        dropout_p > 0.0, S_k % 4 == 0, base_e, lse is not None,
        chunks > 1, chunk, precision(q.dtype), D, block_d,
    )  # fmt: skip
    tensors = q, k, v, *masks, out, lse, part, part_top, part_total
    launch.run(attention_fwd_kernel, grid, tensors, numbers, chosen, seed_words(seed, q))
    if chunks > 1:
        chosen = launch.config("attention_join", "any", q.device.index)
        numbers = (
            B * H * S_q, H, S_q, chunks, kept, *out.stride()[:3], base_e, lse is not None, D,
            block_d,
        )  # fmt: skip
        tensors = part, part_top, part_total, out, lse
        launch.run(attention_join_kernel, (B * H, S_q), tensors, numbers, chosen)

"""Device functions of the attention kernels: one tile of logits, its masks, its dropout.

Indices i (query) and j (key) come as [m, 1] and [1, n], or transposed, and the tile follows: the
backward for keys works on transposed tiles and needs no transposition in registers.
"""

import triton
import triton.language as tl


@triton.jit
def logits_tile(
    product, i, j, bias, padding, slope, S_q, S_k, stride_bi, stride_bj, scale,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_ALIBI: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """product * scale + bias - slope * |i + S_k - S_q - j|, -inf where masked.

    Args:
        product: q k^T, fp32.
        bias, padding: pointers to the row of batch and head, of the batch.
        slope, scale: in the unit of the result, natural or base 2; an added bias is natural.
        BIAS: "none", "add" or "bool" (True keeps).
        MASKED: the tile may reach beyond S_k or the causal edge.
    """
    s = product * scale
    there = (i < S_q) & (j < S_k)
    if BIAS == "add":
        at = bias + i * stride_bi + j * stride_bj
        s += tl.load(at, mask=there, other=0.0).to(tl.float32)
    if HAS_ALIBI:
        s -= slope * tl.abs(i + (S_k - S_q) - j).to(tl.float32)
    if BIAS == "bool":
        at = bias + i * stride_bi + j * stride_bj
        s = tl.where(tl.load(at, mask=there, other=0) != 0, s, float("-inf"))
    if HAS_PADDING:
        s = tl.where(tl.load(padding + j, mask=j < S_k, other=1) == 0, s, float("-inf"))
    if MASKED:
        visible = j < S_k
        if CAUSAL:
            visible = visible & (j <= i + (S_k - S_q))
        s = tl.where(visible, s, float("-inf"))
    return s


@triton.jit
def seed_of(low, high):
    """The 64-bit seed of two 32-bit halves, passed as signed integers; or low points to it."""
    if low.dtype.is_ptr():
        seed = tl.load(low).to(tl.uint64)
    else:
        seed = (high.to(tl.uint32).to(tl.uint64) << 32) | low.to(tl.uint32).to(tl.uint64)
    return seed


@triton.jit
def _words(seed, block):
    """Four words of Philox 4x32-10 for counter (block low, block high, 0, 0)."""
    low = block.to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, (block >> 32).to(tl.uint32), zero, zero, 10)


@triton.jit
def keep_tile(
    first, start, seed, threshold, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Which elements of a tile survive dropout, bool [m, BLOCK_N].

    Element e takes word e & 3 of block e >> 2 and survives iff it is >= threshold.

    Args:
        first: [m], index of each row's element of key 0.   start: first key of the tile.
        ALIGNED: S_k is a multiple of 4, so that rows start with a block and each block is drawn
            once; otherwise each element draws its own, four times the work.
    """
    limit = threshold.to(tl.uint32)
    if ALIGNED:
        e = (first + start)[:, None] + 4 * tl.arange(0, BLOCK_N // 4)[None, :]
        w0, w1, w2, w3 = _words(seed, e.to(tl.uint64) >> 2)
        # [m, n / 4, 2, 2] whose last indices count 0, 1, 2, 3
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        word = tl.reshape(words, (e.shape[0], BLOCK_N))
    else:
        e = (first + start)[:, None] + tl.arange(0, BLOCK_N)[None, :]
        w0, w1, w2, w3 = _words(seed, e.to(tl.uint64) >> 2)
        which = (e & 3).to(tl.int32)
        word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    return word >= limit


@triton.jit
def load_tile(pointer, rows, stride, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D], 0 beyond."""
    d = tl.arange(0, BLOCK_D)
    mask = there[:, None] & (d < D)[None, :]
    return tl.load(pointer + rows[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def keys_there(padding, j, S_k, HAS_PADDING: tl.constexpr):
    """Keys that exist and are no padding: what others hold may be NaN, and 0 * NaN is no 0."""
    there = j < S_k
    if HAS_PADDING:
        there = there & (tl.load(padding + j, mask=there, other=1) == 0)
    return there


@triton.jit
def probabilities(s, top, share, NATURAL: tl.constexpr):
    """P of a tile of logits; top and share broadcast along its keys."""
    if NATURAL:
        return tl.exp(s - top) * share
    return tl.exp2(s - top)

"""Device functions that more than one op uses, and the facts about Triton that they hide.

Under TRITON_INTERPRET=1, read once when Triton is imported, every kernel runs on CPU tensors, as
NumPy arrays, which multiply in an order that depends on how their operands lie (`dot_transposed`).
The interpreter keeps bf16 as 16-bit integers, and needs two shims for it:

- it multiplies those integers in tl.dot, so `dot` hands it fp32. A product of two bf16 (or fp16)
  values is exact in fp32, and tl.dot adds up in fp32 on a GPU too: only the order of sums differs.
- it cuts fp32 off instead of rounding to nearest, so `narrow` rounds on the bits.
"""

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
_SHIM = tl.constexpr(INTERPRETED)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def precision(dtype: torch.dtype) -> str:
    """input_precision of tl.dot: IEEE fp32, and TF32 only where torch was told so.

    That is torch.backends.cuda.matmul.fp32_precision = "tf32" (or the older allow_tf32).
    """
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, added up in fp32. a [m, k] and b [k, n] of one dtype."""
    if _SHIM:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_transposed(a, b, PRECISION: tl.constexpr):
    """a b^T, fp32 [m, n], in the bits of b a^T. a [m, k] and b [n, k] of one dtype.

    On a GPU they are the same sums in the same order. Where exp(logit - maximum) takes one side
    from the one and the other from the other, the last bit of a logit of 900 is 6e-5 of P.
    """
    if _SHIM:
        zero = tl.zeros([b.shape[0], a.shape[0]], tl.float32)
        product = tl.trans(dot(b, tl.trans(a), zero, PRECISION))
    else:
        zero = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
        product = dot(a, tl.trans(b), zero, PRECISION)
    return product


@triton.jit
def narrow(x, T: tl.constexpr):
    """x rounded to T, to nearest even."""
    if _SHIM and T == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(T)

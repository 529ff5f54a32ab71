"""Host side of the attention kernels: how a call is told to them."""

import torch
from torch import Tensor

# Widest head: a row of q, k, v and of the sums lies in registers and shared memory.
WIDEST = 256


def shape_class(itemsize: int, D: int, bias: str = "none", dropout_p: float = 0.0) -> str:
    """The class of dtypes, head sizes and masks that share a launch configuration."""
    width = next(limit for limit in (64, 128, WIDEST) if D <= limit)
    beside = ", dropout" if dropout_p > 0.0 else ", bias" if bias == "add" else ""
    return f"{'16 bit' if itemsize == 2 else 'fp32'}, D <= {width}{beside}"


def bias_kind(attn_bias: Tensor | None) -> str:
    """ "none", "bool" or "add", as the kernels are told."""
    if attn_bias is None:
        return "none"
    return "bool" if attn_bias.dtype == torch.bool else "add"


def natural(q: Tensor, bias: str) -> bool:
    """Whether exponentials are taken in base e (see the top of the file)."""
    return q.dtype == torch.float32 or bias == "add"


def halves(seed: int) -> tuple[int, int]:
    """The low and high 32 bits of a seed as signed integers."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def seed_words(seed: int | Tensor | None, like: Tensor) -> tuple[int | Tensor, int]:
    """The seed as kernels take it: its halves, or, where a graph is traced, the tensor that will
    hold it, and 0."""
    if isinstance(seed, Tensor) and type(seed) is not Tensor:
        return seed.to(like.device), 0
    return halves(0 if seed is None else int(seed))


def threshold(dropout_p: float) -> int:
    """Words below floor(p * 2^32) drop; as a signed integer."""
    return halves(int(dropout_p * 2**32))[0]

"""The dropout mask all backends share: Philox 4x32-10 in torch integer arithmetic.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

import torch
from torch import Tensor

from .. import checks

SEED_END = 2**63  # seeds are non-negative int64

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
_ROUNDS = 10


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    # int64 wraps modulo 2^64, so the bits of the unsigned product are all there; the shift
    # carries the sign along, which the mask removes.
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words per counter, each held in an int64.

    Args:
        counter: four int64 tensors of one shape, values in [0, 2^32).
        key: two int64 tensors (0-d), values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        hi0, lo0 = _multiply(c0, _MULTIPLIERS[0])
        hi1, lo1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def keep_mask(start: int, count: int, dropout_p: float, seed: int | Tensor, device) -> Tensor:
    """Which of the elements start .. start + count - 1 survive dropout; bool, [count].

    Element e takes word e & 3 of the Philox output for counter (e >> 2, 0, 0) under the seed, and
    survives iff the word is >= floor(dropout_p * 2^32).

    Args:
        seed: int in [0, 2^63), or a 0-d int64 tensor holding one.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    key = (seed & _MASK, (seed >> 32) & _MASK)
    first = start >> 2
    groups = torch.arange(first, (start + count + 3) >> 2, dtype=torch.int64, device=device)
    zero = torch.zeros_like(groups)
    words = torch.stack(philox_4x32((groups & _MASK, groups >> 32, zero, zero), key), -1)
    offset = start - 4 * first
    return words.view(-1)[offset : offset + count] >= int(dropout_p * 2**32)


def check_dropout(op: str, dropout_p: float, seed: int | None) -> None:
    """Raise unless dropout_p lies in [0, 1) and seed is None or an int in [0, 2^63)."""
    checks.is_number(op, "dropout_p", dropout_p)
    checks.in_range(op, "dropout_p", dropout_p, 0.0 <= dropout_p < 1.0, "in [0, 1)")
    if seed is not None:
        if not isinstance(seed, int):
            raise TypeError(f"{op}: seed must be an int or None, got {type(seed).__name__}")
        checks.in_range(op, "seed", seed, 0 <= seed < SEED_END, "in [0, 2^63)")


def seed_tensor(dropout_p: float, seed: int | None) -> Tensor | None:
    """The seed as a 0-d int64 tensor, so that a compiled graph draws anew at each call; None where
    nothing is dropped. A seed of None is drawn from torch's default CPU generator."""
    if dropout_p == 0.0:
        return None  # torch's generator stays where it is
    if seed is None:
        return torch.randint(SEED_END - 1, (), dtype=torch.int64)
    return torch.tensor(seed, dtype=torch.int64)

"""The least work of a prefill and of a step, and the time that the measured roofs allow for it.

L layers, C n_embd, F n_inner, V vocab_size, B rows, S prompt tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..gpt import GPTConfig
from .systems import Work

# int4: half a byte and a 16-bit scale per 64 weights, in all matrices and the head.
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 64}
CACHE_BYTES = {"fp32": 4, "bf16": 2, "int8": 2, "int4": 2}


@dataclass(frozen=True)
class Load:
    """FLOP (a multiply-add counts 2) and bytes read at least."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes

    def seconds(self, peaks: dict, format: str) -> float:
        """The roofline: max(FLOP / FLOP per second, bytes / bytes per second)."""
        return max(self.flops / peaks["flops"][format], self.bytes / peaks["bandwidth"])


def _weights(c: GPTConfig) -> tuple[int, int]:
    """Matrix elements of all blocks, and of the LM head; vectors are below a thousandth of them."""
    return c.n_layer * (4 * c.n_embd**2 + 2 * c.n_embd * c.n_inner), c.vocab_size * c.n_embd


def prefill(c: GPTConfig, work: Work, format: str) -> Load:
    """Every weight read once; causal attention, half of S x S; the head on the last position."""
    blocks, head = _weights(c)
    B, S = work.batch, work.prompt
    flops = B * (2 * blocks * S + 2 * head + 2 * c.n_layer * c.n_embd * S * S)
    return Load(flops, (blocks + head) * WEIGHT_BYTES[format])


def step(c: GPTConfig, work: Work, format: str) -> Load:
    """Every weight read once, and the keys and values of half of the new tokens' contexts."""
    blocks, head = _weights(c)
    tokens = work.batch * (work.prompt + work.new_tokens / 2)
    cache = 2 * c.n_layer * c.n_embd * tokens  # elements of keys and values
    flops = 2 * work.batch * (blocks + head) + 2 * cache
    return Load(flops, (blocks + head) * WEIGHT_BYTES[format] + cache * CACHE_BYTES[format])

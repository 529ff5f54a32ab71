"""The inference step of a GPT-2-class model in one call of C++: csrc/gpt/decoder.h.

B sequences, S new tokens, T cached + new ones, C width, L layers, H heads, D = C / H, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends
from .ops.gemm import PackedWeight


@dataclass(frozen=True)
class Projection:
    """weight: packed, or a tensor in `layout` "nk" or "kn". bias: [N] or None.

    lora: None, or a packed A [r, K], B [N, r] in fp32 and a scale: scale (x A^T) B^T is added.
    """

    weight: PackedWeight | Tensor
    bias: Tensor | None
    layout: str
    lora: tuple[PackedWeight, Tensor, float] | None = None

    def as_tuple(self) -> tuple:
        w, lora = self.weight, self.lora
        if lora is not None:
            A, B, scale = lora
            lora = A.data, A.format, A.N, B, scale
        if isinstance(w, PackedWeight):
            return w.data, w.format, w.N, w.K, w.group or 0, self.bias, lora
        return w, self.layout, self.bias, lora


Norm = tuple[Tensor, Tensor | None]  # weight, bias


@dataclass(frozen=True)
class Layer:
    """One block: x += proj(attention(qkv(norm1(x)))), x += out(activation(fc(norm2(x))))."""

    attention_scale: float
    norm1: Norm
    qkv: Projection
    proj: Projection
    norm2: Norm
    fc: Projection
    out: Projection

    def as_tuple(self) -> tuple:
        q, p, f, o = (part.as_tuple() for part in (self.qkv, self.proj, self.fc, self.out))
        return self.attention_scale, self.norm1, q, p, self.norm2, f, o


@dataclass(frozen=True)
class Parts:
    """A whole model. wte [V, C], wpe [positions, C]; activation as ops.gemm names it."""

    wte: Tensor
    wpe: Tensor
    layers: list[Layer]
    norm: Norm
    head: Projection
    n_head: int
    eps: float
    activation: str


class Decoder:
    """One sequence batch being written: the model's parts and their KV cache.

    Raises ValueError, naming the part, where shapes or dtypes do not fit together.
    """

    def __init__(self, parts: Parts, batch: int, capacity: int):
        self.parts = parts  # the C++ object borrows their memory
        self._decoder = backends._C.Decoder(
            parts.wte,
            parts.wpe,
            [layer.as_tuple() for layer in parts.layers],
            parts.norm,
            parts.head.as_tuple(),
            parts.n_head,
            parts.eps,
            parts.activation,
        )
        V, C = parts.wte.shape
        shape = len(parts.layers), batch, parts.n_head, capacity, C // parts.n_head  # L B H T D
        self.keys, self.values = (torch.empty(shape, dtype=parts.wte.dtype) for _ in range(2))
        self.logits = torch.empty(batch, V, dtype=parts.wte.dtype)
        self.length = 0

    def step(
        self, ids: Tensor, padding: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Append ids, int64 [B, S], to the cache; returns the last positions' logits, [B, V].

        padding: bool [B, T], True hides a token. positions: int64 [B, S], counted from the cache's
            length by default. The result is overwritten by the next step.
        """
        B, S = ids.shape
        if positions is None:
            positions = torch.arange(self.length, self.length + S).expand(B, S)
        self._decoder.step(
            ids, positions, padding, self.keys, self.values, self.length, self.logits
        )
        self.length += S
        return self.logits

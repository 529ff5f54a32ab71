"""The inference step of a GPT-2-class model in one call of C++: csrc/gpt/decoder.h, and on CUDA
csrc/gpt/decoder_cuda.h.

B sequences, S new tokens, T cached + new ones, C width, L layers, H heads, D = C / H, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import backends, checks
from .ops.gemm import PackedWeight


@dataclass(frozen=True)
class Projection:
    """weight: packed, or a tensor in `layout` "nk" or "kn". bias: [N] or None.

    lora: None, or a packed A [r, K], B [N, r] in fp32 and a scale: scale (x A^T) B^T is added. For
        "cuda" A and B are plain, in the model's dtype, and the scale is in B.
    """

    weight: PackedWeight | Tensor
    bias: Tensor | None
    layout: str
    lora: tuple[PackedWeight, Tensor, float] | tuple[Tensor, Tensor] | None = None

    def as_tuple(self) -> tuple:
        w, lora = self.weight, self.lora
        if lora is not None and isinstance(lora[0], PackedWeight):
            A, B, scale = lora
            lora = A.data, A.format, A.N, B, scale
        if isinstance(w, PackedWeight):
            return w.data, w.format, w.N, w.K, w.group or 0, self.bias, lora
        return w, self.layout, self.bias, lora

    def along_inputs(self) -> Projection:
        if self.layout == "nk" or isinstance(self.weight, PackedWeight):
            return self
        return replace(self, weight=self.weight.t().contiguous(), layout="nk")


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
    """A whole model. wte [V, C], wpe [positions, C]; activation as ops.gemm names it.

    backend: whose decoder runs it, "cpu" (`Decoder`) or "cuda" (`CudaDecoder`).
    embeddings_scale: multiplies token + position embeddings; 1 for "cpu", whose tables hold it.
    """

    wte: Tensor
    wpe: Tensor
    layers: list[Layer]
    norm: Norm
    head: Projection
    n_head: int
    eps: float
    activation: str
    backend: str = "cpu"
    embeddings_scale: float = 1.0

    def as_arguments(self) -> tuple:
        layers = [layer.as_tuple() for layer in self.layers]
        head = self.head.as_tuple()
        rest = self.n_head, self.eps, self.activation
        return self.wte, self.wpe, layers, self.norm, head, *rest

    def along_inputs(self) -> Parts:
        """The same with every weight [N, K]: those that are stored [K, N] are copied."""
        names = ("qkv", "proj", "fc", "out")
        layers = [
            replace(layer, **{name: getattr(layer, name).along_inputs() for name in names})
            for layer in self.layers
        ]
        return replace(self, layers=layers, head=self.head.along_inputs())


def kind_for(asked: str, wte: Tensor) -> str | None:
    """The backend whose decoder runs a model whose blocks were asked to run on `asked`: "cpu",
    "cuda", or None where only modules can."""
    for kind, module, name in (
        ("cpu", backends._C, "Decoder"),
        ("cuda", backends.cuda_kernels(), "CudaDecoder"),
    ):
        if asked in ("auto", kind) and hasattr(module, name) and backends.takes(kind, wte):
            return kind
    return None


KV_CACHES = (None, "int8")


def new_cache(
    parts: Parts, B: int, T: int, kv_cache: str | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Keys and values [L, B, H, T, D] of up to T tokens, and of "int8" their scales [L, B, H, T],
    else None."""
    checks.is_choice("Decoder", "kv_cache", kv_cache, KV_CACHES)
    new, L, H = parts.wte.new_empty, len(parts.layers), parts.n_head
    dtype = torch.int8 if kv_cache == "int8" else parts.wte.dtype
    keys, values = (new(L, B, H, T, parts.wte.shape[1] // H, dtype=dtype) for _ in range(2))
    if kv_cache is None:
        return keys, values, None, None
    key_scales, value_scales = (new(L, B, H, T, dtype=torch.float32) for _ in range(2))
    return keys, values, key_scales, value_scales


class Decoder:
    """One sequence batch being written: the model's parts and their KV cache.

    kv_cache: None stores keys and values as the model computes them; "int8" in 8 bits, with a scale
        for each head and token: D + 4 bytes instead of 2 D in bf16.

    Raises ValueError, naming the part, where shapes or dtypes do not fit together.
    """

    def __init__(self, parts: Parts, batch: int, capacity: int, kv_cache: str | None = None):
        self.parts = parts  # the C++ object borrows their memory
        self._decoder = backends._C.Decoder(*parts.as_arguments())
        cache = new_cache(parts, batch, capacity, kv_cache)
        self.keys, self.values, self.key_scales, self.value_scales = cache
        self.logits = parts.wte.new_empty(batch, parts.wte.shape[0])
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
            *(ids, positions, padding, self.keys, self.values, self.length, self.logits),
            *(self.key_scales, self.value_scales),
        )
        self.length += S
        return self.logits


class CudaDecoder:
    """One sequence batch being written on a GPU, in `tokens` itself: a step reads its tokens there
    and leaves the greedy one behind them, and where it stands lies in device memory. So a step of
    one token is the same launches every time, captured once as a CUDA graph and replayed.

    tokens: int64 [B, total], contents below V; what a step has written may be overwritten before
        the next one.
    padding: int64 [B], how many leading tokens of each row are padding; None: none.
    kv_cache: as `Decoder` has it. A prompt still sees its own keys and values as they are computed.

    Raises ValueError, naming the part, where shapes or dtypes do not fit together.
    """

    # Whether a step of few sequences is one launch where its shape allows that
    # (csrc/gpt/decoder_persistent.cuh): only where asked until a GPU has timed it.
    AT_ONCE = False
    # Steps that must be left for a capture to be made, which costs about as much as a few of them.
    WORTH_CAPTURING = 8

    def __init__(
        self,
        parts: Parts,
        tokens: Tensor,
        padding: Tensor | None = None,
        kv_cache: str | None = None,
    ):
        kernels = backends.cuda_kernels()
        if self.AT_ONCE:
            parts = parts.along_inputs()
        self.parts, self.tokens = parts, tokens  # the C++ object borrows the parts' memory
        self._decoder = kernels.CudaDecoder(*parts.as_arguments(), parts.embeddings_scale)
        (B, self.total), (V, C), H = tokens.shape, parts.wte.shape, parts.n_head
        new, D = parts.wte.new_empty, C // H
        cache = new_cache(parts, B, self.total, kv_cache)
        self.keys, self.values, self.key_scales, self.value_scales = cache
        self.logits = new(B, V)
        self._memory = self._memory_of(1)
        work = B * H * kernels.decoder_attention_cuda(self.total, D)
        self._work = new(work, dtype=torch.float32)
        self._state: Tensor | None = None  # of the one launch
        if self.AT_ONCE and kv_cache is None and self._decoder.at_once_fits(B):
            words = kernels.decoder_persistent_state_cuda(B, H, self.total, D)
            self._state = tokens.new_zeros(words, dtype=torch.int32)
        self._hidden = torch.ones_like(tokens, dtype=torch.bool)
        self._length = tokens.new_zeros(B)
        self._padding = self._length.clone() if padding is None else padding
        self.length = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def step(self, S: int = 1) -> Tensor:
        """Append the next S of the tokens to the cache (S > 1: the first ones); returns the last
        one's logits, [B, V], which the next step overwrites."""
        if self.length + S > self.total or (S > 1 and self.length):
            raise ValueError(
                f"CudaDecoder: S must be 1, or the first {self.total} tokens at most, got {S} "
                f"after {self.length}"
            )
        first = self.length == 0
        self.length += S
        if self._graph is not None:
            self._graph.replay()
        elif S > 1:
            self._launch(self._memory_of(S))
        elif first or not self.tokens.is_cuda or self.total - self.length < self.WORTH_CAPTURING:
            self._launch(self._memory)
        else:
            self._capture()
        return self.logits

    def _memory_of(self, S: int) -> tuple[Tensor, Tensor]:
        """What a step of S tokens works in: the room of its rows, and that of a weight which is
        unpacked before it is multiplied."""
        B, new = self.tokens.shape[0], self.parts.wte.new_empty
        return new(B * S, self._decoder.room()), new(self._decoder.unpacked(B * S, B))

    def _launch(self, memory: tuple[Tensor, Tensor]) -> None:
        place = self.tokens, self._length, self._padding, self._hidden
        cache = self.keys, self.values, self.key_scales, self.value_scales
        state = self._state if memory is self._memory else None
        self._decoder.step(*place, *cache, *memory, self._work, self.logits, state)

    def _capture(self) -> None:
        """One step as it is, which loads what it needs, then the graph of those to come."""
        with torch.cuda.device(self.tokens.device):
            self._launch(self._memory)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._launch(self._memory)
        self._graph = graph

"""Quantized checkpoints of the reference GPT: written, read back, and what they cost in loss.

A folder in Hugging Face layout whose projections are stored as they are computed with: for each
`NAME.weight` a uint8 tensor `NAME.packed` (csrc/ops/gemm/packed.h). config.json names format and
shape of each under "quantization_config", which transformers refuses rather than misreads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint, checks
from .gpt import GPT, GPTConfig
from .ops.gemm import PackedWeight
from .replace import QUANTIZED, packing, replace
from .train import loss_of

METHOD = "cgpt_kernels"


@dataclass(frozen=True)
class Report:
    """Loss in nats per token before and after quantizing, over `tokens` tokens; bytes of the
    weights that a decode step reads."""

    quantize: str
    tokens: int
    loss: float
    quantized_loss: float
    bytes: int
    quantized_bytes: int

    @property
    def perplexity_change(self) -> float:
        """Relative: 0.01 is one per cent more."""
        return math.expm1(self.quantized_loss - self.loss)


def held_out_text(characters: int = 60_000) -> list[str]:
    """Text that the shipped model was not trained on and every Python has, shortest files first."""
    from .assets.train_tiny import documents

    texts, left = [], characters
    for text in sorted((text for _, text in documents()[1]), key=len):
        if left <= 0:
            break
        texts.append(text[:left])
        left -= len(text)
    return texts


def read_text(file: Path) -> str:
    """The text of a file to measure on; ValueError where it holds none."""
    try:
        found = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"quantize: {file} must be UTF-8: {error}") from None
    if not found.strip():
        raise ValueError(f"quantize: {file} must hold text, got an empty file")
    return found


def measure(model: GPT, quantize: str, ids: np.ndarray | Tensor) -> Report:
    """What quantizing the projections of `model` does; the model is as it was afterwards."""
    checks.is_choice("quantize", "format", quantize, QUANTIZED)
    _is_gpt(model)
    loss = loss_of(model, ids)
    weights = {id(m.weight): m.weight.nbytes for m in model.modules() if type(m) is nn.Linear}
    with replace(model, quantize=quantize) as replacement:
        after = loss_of(model, ids)
        packed = replacement.table.packed
    return Report(quantize, len(ids) - 1, loss, after, sum(weights.values()), packed)


def save(model: GPT, path: str | os.PathLike, quantize: str) -> None:
    """Write `model`, a `GPT` with all its weights, quantized; each file is replaced atomically."""
    checks.is_choice("quantize", "format", quantize, QUANTIZED)
    _is_gpt(model)
    with replace(model, quantize=quantize):
        tied, tensors, formats = packing.tied(model), model.state_dict(), {}
        for name, module in model.named_modules():
            if not isinstance(module, packing.Packable):
                continue
            copy = packing.current(module, module.weight)
            del tensors[f"{name}.weight"]
            if id(module.weight) not in tied:  # the head is packed again from the embedding
                tensors[f"{name}.packed"] = copy.data
                formats[name] = [copy.format, copy.N, copy.K, copy.group]
    dtype = str(model.transformer.wte.weight.dtype).removeprefix("torch.")
    about = {"quant_method": METHOD, "quantize": quantize, "weights": formats}
    config = model.config.to_dict() | {"dtype": dtype, "quantization_config": about}
    checkpoint.write(path, config, tensors)


def _is_gpt(model) -> None:
    if not isinstance(model, GPT):
        raise TypeError(f"quantize: model must be a cgpt_kernels.GPT, got {type(model).__name__}")


def is_quantized(path: str | os.PathLike) -> bool:
    """Whether the folder was written by `save`."""
    fields, _ = checkpoint.read_config(path)
    return _about(fields).get("quant_method") == METHOD


def load(path: str | os.PathLike, *, dtype: torch.dtype | None = None) -> GPT:
    """Read what `save` wrote: a `GPT` in eval mode on the CPU, replaced, its projections packed
    only (`replace(..., keep_original=False)` says what that means).

    dtype: of everything that is not quantized; None keeps what is stored.
    Raises ValueError naming the file and the field or tensor.
    """
    fields, where = checkpoint.read_config(path)
    about = _about(fields)
    if about.get("quant_method") != METHOD:
        raise ValueError(f"{where}: quantization_config.quant_method must be {METHOD!r}")
    config = GPTConfig.from_dict(fields, where=where)
    with torch.device("meta"):
        model = GPT(config)
    modules = dict(model.named_modules())
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    copies = {}
    for name, (format, N, K, group) in about["weights"].items():
        shape = tuple(modules[name].weight.shape) if name in modules else None
        if (N, K) != shape:
            raise ValueError(f"{where}: {name} must have shape {shape}, got {(N, K)}")
        del expected[f"{name}.weight"]
        copies[name] = format, N, K, group
        expected[f"{name}.packed"] = (packing.packed_bytes(format, N, K, group),)
    tensors = checkpoint.read_weights(path, expected, dtype, "cpu")
    packed = {name: tensors.pop(f"{name}.packed") for name in copies}
    model.load_state_dict(tensors, assign=True, strict=False)
    model.lm_head.weight = model.transformer.wte.weight
    kept = model.transformer.wte.weight.dtype
    replace(model)
    for name, facts in copies.items():
        module = modules[name]
        module.quantize = about["quantize"]
        module.weight.data = module.weight.data.to(kept)
        module.packed_copy = packing.Copy(PackedWeight(packed[name], *facts), None, only=True)
    model.lm_head.quantize = "int8"
    packing.current(model.lm_head, model.lm_head.weight)
    return model.eval()


def _about(fields: dict) -> dict:
    about = fields.get("quantization_config")
    return about if isinstance(about, dict) else {}


def encode(folder: str | os.PathLike, tokenizer, texts: Iterable[str]) -> np.ndarray:
    """The texts as one token stream, each ended by the model's end-of-text token if it has one."""
    end = checkpoint.read_config(folder)[0].get("eos_token_id")
    stream: list[int] = []
    for encoded in tokenizer.encode_batch(list(texts)):
        stream += encoded.ids
        if isinstance(end, int):
            stream.append(end)
    return np.array(stream, dtype=np.int64)

"""Held-out loss: every token of a stream predicted once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..gpt import GPT


def loss_of(
    model: GPT,
    ids: np.ndarray | Tensor,
    *,
    length: int | None = None,
    limit: int | None = None,
) -> float:
    """Mean loss in nats per token over windows of `length` tokens of the stream `ids` [n].

    Every token but the first is predicted once, from those before it in its window.

    model: a `GPT`; its mode is restored. Nothing is drawn, so training goes on as without it.
    ids: integers, also a memory map.
    length: default n_positions.
    limit: at most so many tokens, in whole windows spread evenly over the stream.
    """
    length = length or model.config.n_positions
    if len(ids) < 2:
        raise ValueError(f"loss_of: ids must hold at least 2 tokens, got {len(ids)}")
    starts = range(0, len(ids) - 1, length)
    if limit is not None and limit < len(ids) - 1:
        count = max(1, limit // length)
        starts = [len(starts) * i // count * length for i in range(count)]
    training, total, tokens = model.training, 0.0, 0
    model.eval()
    try:
        with torch.no_grad():
            for start in starts:
                part = torch.as_tensor(np.asarray(ids[start : start + length + 1], dtype=np.int64))
                loss = model(part[None, :-1], targets=part[None, 1:])
                total += loss.item() * (len(part) - 1)
                tokens += len(part) - 1
    finally:
        model.train(training)
    return total / tokens

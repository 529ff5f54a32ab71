"""Which window of the data comes when: a function of the seed and the position, with no state.

T window length, N tokens of a stream, W windows of an epoch. An epoch visits each of its windows
once, in a seeded order, and cuts them at an offset of its own, so that no epoch repeats another's
windows.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class Windows:
    """The endless sequence of windows of one stream."""

    def __init__(self, stream: np.ndarray, length: int, seed: int, name: str):
        """stream: integers [N], N > length. Raises ValueError naming `name` where it is shorter."""
        if len(stream) <= length:
            raise ValueError(
                f"train: {name} has {len(stream)} tokens, but a window takes context + 1 = "
                f"{length + 1}: give more text, or a smaller context"
            )
        self.stream, self.length, self.seed = stream, length, seed
        self.count = max(1, (len(stream) - length) // length)  # W: leaves room for an offset
        self._epoch, self._starts = -1, np.empty(0)

    def __getitem__(self, index: int) -> np.ndarray:
        """The index-th window, T + 1 tokens: T inputs, and the last one's target."""
        epoch, place = divmod(index, self.count)
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            spare = len(self.stream) - 1 - self.count * self.length
            offset = int(random.integers(0, min(self.length - 1, spare) + 1))
            self._epoch, self._starts = epoch, random.permutation(self.count) * self.length + offset
        start = int(self._starts[place])
        return self.stream[start : start + self.length + 1]


class Mixture:
    """Windows of `main`, with `share` of `replay`'s evenly between them."""

    def __init__(self, main: Windows, replay: Windows | None = None, share: float = 0.0):
        self.main, self.replay, self.share = main, replay, share

    def __getitem__(self, index: int) -> np.ndarray:
        before, after = math.floor(index * self.share), math.floor((index + 1) * self.share)
        return self.replay[before] if after > before else self.main[index - before]

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [count, T], of windows first to first + count - 1."""
        rows = np.stack([self[first + i] for i in range(count)]).astype(np.int64)
        rows = torch.from_numpy(rows)
        return rows[:, :-1], rows[:, 1:]

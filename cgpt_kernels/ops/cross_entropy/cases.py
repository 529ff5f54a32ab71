"""Named cases of linear_cross_entropy. Letters: M rows, K width, V vocabulary."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..case import BENCH, BOTH, Case, Random


@dataclass(frozen=True, kw_only=True)
class LinearCrossEntropyCase(Case):
    op: ClassVar[str] = "linear_cross_entropy"
    M: int | tuple[int, ...]
    K: int
    V: int
    bias: bool = False
    ignored: float = 0.0
    smoothing: float = 0.0
    reduction: str = "mean"
    ignore_index: int = -100
    spread: float = 1.0

    @property
    def rows(self) -> tuple[int, ...]:
        return self.M if isinstance(self.M, tuple) else (self.M,)

    def inputs(self, dtype, device="cpu", seed=0):
        draw = Random(seed, dtype, device)
        target = draw.integers(self.V, *self.rows)
        given = {
            "x": draw.normal(*self.rows, self.K),
            "weight": draw.normal(self.V, self.K, std=self.spread * self.K**-0.5),
            "target": target.masked_fill(draw.chance(self.ignored, *self.rows), self.ignore_index),
            "ignore_index": self.ignore_index,
            "label_smoothing": self.smoothing,
            "reduction": self.reduction,
        }
        if self.bias:
            given["bias"] = draw.normal(self.V)
        return given

    def torch_call(self, inputs, wrap=lambda f: f):
        options = dict(
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.smoothing,
        )

        def loss(x, weight, target, bias):  # as transformers: all logits in fp32
            logits = F.linear(x, weight, bias).float()
            return F.cross_entropy(logits.flatten(0, -2), target.flatten(), **options)

        loss = wrap(loss)
        args = inputs["x"], inputs["weight"], inputs["target"], inputs.get("bias")
        return lambda: loss(*args)

    @property
    def flops(self):
        M = torch.Size(self.rows).numel()
        return 2 * M * self.V * self.K + 3 * M * self.V  # product; running max, exp, sum

    def bytes(self, dtype):
        M = torch.Size(self.rows).numel()
        matrices = M * self.K + self.V * self.K + self.bias * self.V
        return matrices * dtype.itemsize + M * (8 + 4)


CASES = [
    LinearCrossEntropyCase(name="ones", M=1, K=1, V=1, why="one class: loss 0"),
    LinearCrossEntropyCase(name="tiny", M=2, K=8, V=11, use=BOTH, why="overhead is all there is"),
    LinearCrossEntropyCase(name="odd", M=13, K=33, V=101, why="every blocking has a tail"),
    LinearCrossEntropyCase(name="bias", M=(3, 5), K=24, V=67, bias=True, why="head with a bias"),
    LinearCrossEntropyCase(name="sum", M=9, K=24, V=40, reduction="sum", why="other reduction"),
    LinearCrossEntropyCase(name="rows", M=(2, 9), K=24, V=40, reduction="none", why="per token"),
    LinearCrossEntropyCase(name="ignored", M=40, K=24, V=50, ignored=0.4, why="padded targets"),
    LinearCrossEntropyCase(
        name="all_ignored",
        M=6,
        K=16,
        V=20,
        ignored=1.1,
        reduction="sum",
        why="no row counts: loss 0 and gradient 0",
    ),
    LinearCrossEntropyCase(
        name="ignore_3",
        M=60,
        K=16,
        V=5,
        ignore_index=3,
        why="an ignored index that is a class: its column still takes part in the softmax",
    ),
    LinearCrossEntropyCase(
        name="smoothing",
        M=21,
        K=32,
        V=130,
        smoothing=0.1,
        ignored=0.2,
        why="smoothing needs the mean of all logits of a row",
    ),
    LinearCrossEntropyCase(
        name="spread",
        M=17,
        K=64,
        V=300,
        spread=12.0,
        why="logits beyond exp's range in fp16 and far apart: the running maximum is needed",
    ),
    LinearCrossEntropyCase(name="vocabulary", M=5, K=16, V=50257, why="odd vocabulary, odd rows"),
    LinearCrossEntropyCase(
        name="111m_512", M=512, K=768, V=50257, use=(BENCH,), why="111M head, 512 tokens"
    ),
    LinearCrossEntropyCase(
        name="111m_64", M=64, K=768, V=50257, use=(BENCH,), why="few tokens: weights rule"
    ),
]

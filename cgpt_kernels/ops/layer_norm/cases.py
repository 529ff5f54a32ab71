"""Named cases of layer_norm and add_layer_norm. Letters: rows, C width."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..case import BENCH, BOTH, Case, Random


@dataclass(frozen=True, kw_only=True)
class LayerNormCase(Case):
    op: ClassVar[str] = "layer_norm"
    rows: tuple[int, ...]
    C: int
    bias: bool = True
    fp32_parameters: bool = False
    offset: float = 0.0

    def inputs(self, dtype, device="cpu", seed=0):
        draw = Random(seed, dtype, device)
        parameter = torch.float32 if self.fp32_parameters and dtype != torch.float64 else dtype
        given = {"x": (draw.normal(*self.rows, self.C) + self.offset).to(dtype)}
        given["weight"] = 1 + draw.normal(self.C, std=0.2, dtype=parameter)
        if self.bias:
            given["bias"] = draw.normal(self.C, dtype=parameter)
        return given

    def torch_call(self, inputs, wrap=lambda f: f):
        x, *parameters = inputs["x"], inputs["weight"], inputs.get("bias")
        norm = wrap(lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias))
        return lambda: norm(x, *parameters)

    @property
    def elements(self) -> int:
        return int(torch.Size(self.rows).numel()) * self.C

    @property
    def flops(self):
        return 7 * self.elements  # sum; centre, square, sum; scale by rstd; weight, bias

    def bytes(self, dtype):
        parameters = self.C * (1 + self.bias) * (4 if self.fp32_parameters else dtype.itemsize)
        return 2 * self.elements * dtype.itemsize + parameters


@dataclass(frozen=True, kw_only=True)
class AddLayerNormCase(LayerNormCase):
    op: ClassVar[str] = "add_layer_norm"

    def inputs(self, dtype, device="cpu", seed=0):
        given = super().inputs(dtype, device, seed)
        residual = Random(seed + 1, dtype, device).normal(*self.rows, self.C)
        return {"x": given.pop("x"), "residual": residual, **given}

    def torch_call(self, inputs, wrap=lambda f: f):
        def add_norm(x, residual, weight, bias):
            total = x + residual
            return F.layer_norm(total, weight.shape, weight, bias), total

        add_norm = wrap(add_norm)
        args = inputs["x"], inputs["residual"], inputs["weight"], inputs.get("bias")
        return lambda: add_norm(*args)

    @property
    def flops(self):
        return 8 * self.elements

    def bytes(self, dtype):
        return super().bytes(dtype) + 2 * self.elements * dtype.itemsize


_SHAPES = [
    dict(name="one_row_768", rows=(1, 1), C=768, use=BOTH, why="decode: overhead is all there is"),
    dict(name="c_1", rows=(5,), C=1, why="variance 0 in every row: y = bias"),
    dict(name="c_3", rows=(2, 7), C=3, why="shorter than any vector register"),
    dict(name="c_1_one_row", rows=(1,), C=1, why="the smallest call there is"),
    dict(name="odd_tail", rows=(3, 11), C=1023, why="tail of the last vector, odd row starts"),
    dict(name="no_bias", rows=(9,), C=64, bias=False, why="bias is optional"),
    dict(
        name="fp32_parameters",
        rows=(4, 5),
        C=136,
        fp32_parameters=True,
        why="mixed precision keeps parameters in fp32",
    ),
    dict(
        name="large_mean",
        rows=(6,),
        C=640,
        offset=60.0,
        why="E[x^2] - E[x]^2 loses all digits here; the variance must be taken around the mean",
    ),
    dict(name="many_rows", rows=(4, 33), C=80, why="more rows than threads, uneven split"),
    dict(name="111m_512", rows=(1, 512), C=768, use=(BENCH,), why="Cerebras-GPT 111M prefill"),
    dict(name="256m_512", rows=(1, 512), C=1088, use=(BENCH,), why="width is no power of two"),
    dict(name="590m_2048", rows=(1, 2048), C=1536, use=(BENCH,), why="full context, out of L2"),
    dict(name="6b7_512", rows=(1, 512), C=4096, use=(BENCH,), why="one row fills half an L1"),
    dict(name="batch_8x1", rows=(8, 1), C=768, use=(BENCH,), why="batched decode"),
]

CASES = [cls(**shape) for cls in (LayerNormCase, AddLayerNormCase) for shape in _SHAPES]

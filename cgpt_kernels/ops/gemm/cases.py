"""Named cases of gemm. Letters: M rows, N output width, K reduced width."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..case import BENCH, BOTH, Case, Random


@dataclass(frozen=True, kw_only=True)
class GemmCase(Case):
    op: ClassVar[str] = "gemm"
    M: int | tuple[int, ...]
    N: int
    K: int
    activation: str | None = None
    bias: bool = True
    residual: bool = False
    layout: str = "nk"
    fp32_bias: bool = False
    dropout_p: float = 0.0

    @property
    def rows(self) -> tuple[int, ...]:
        return self.M if isinstance(self.M, tuple) else (self.M,)

    def inputs(self, dtype, device="cpu", seed=0):
        draw = Random(seed, dtype, device)
        shape = (self.N, self.K) if self.layout == "nk" else (self.K, self.N)
        given = {
            "x": draw.normal(*self.rows, self.K),
            "weight": draw.normal(*shape, std=self.K**-0.5),
            "weight_layout": self.layout,
            "activation": self.activation,
        }
        if self.bias:
            wide = torch.float32 if self.fp32_bias and dtype != torch.float64 else dtype
            given["bias"] = draw.normal(self.N, dtype=wide)
        if self.residual:
            given["residual"] = draw.normal(*self.rows, self.N)
        if self.dropout_p:
            given.update(dropout_p=self.dropout_p, seed=0x1234_5678_9ABC)
        return given

    def torch_call(self, inputs, wrap=lambda f: f):
        activation, kn = self.activation, self.layout == "kn"

        def product(x, weight, bias, residual):
            if kn and bias is not None:  # as transformers' Conv1D
                y = torch.addmm(bias, x.view(-1, x.shape[-1]), weight)
                y = y.view(*x.shape[:-1], weight.shape[1])
            else:
                y = F.linear(x, weight.t() if kn else weight, bias)
            if activation is not None:
                tanh = "tanh" if activation == "gelu_tanh" else "none"
                y = F.relu(y) if activation == "relu" else F.gelu(y, approximate=tanh)
            if self.dropout_p:
                y = F.dropout(y, self.dropout_p)
            return y if residual is None else y + residual

        product = wrap(product)
        args = inputs["x"], inputs["weight"], inputs.get("bias"), inputs.get("residual")
        return lambda: product(*args)

    @property
    def flops(self):
        return 2 * torch.Size(self.rows).numel() * self.N * self.K

    def bytes(self, dtype):
        M = torch.Size(self.rows).numel()
        elements = M * self.K + self.N * self.K + M * self.N * (1 + self.residual)
        return elements * dtype.itemsize + self.bias * self.N * dtype.itemsize


def _model(name: str, M: int, d: int, why: str) -> list[GemmCase]:
    """The four products of a GPT-2 block at width d."""
    kn = dict(M=M, layout="kn", use=(BENCH,))
    return [
        GemmCase(name=f"{name}_qkv", N=3 * d, K=d, why=f"{why}: query, key, value at once", **kn),
        GemmCase(name=f"{name}_proj", N=d, K=d, residual=True, why=f"{why}: attention out", **kn),
        GemmCase(name=f"{name}_fc1", N=4 * d, K=d, activation="gelu", why=f"{why}: MLP up", **kn),
        GemmCase(name=f"{name}_fc2", N=d, K=4 * d, residual=True, why=f"{why}: MLP down", **kn),
    ]


CASES = [
    GemmCase(name="ones", M=1, N=1, K=1, why="the smallest call there is"),
    GemmCase(name="tiny", M=2, N=8, K=8, use=BOTH, why="overhead is all there is"),
    GemmCase(name="vector", M=1, N=96, K=160, why="M = 1 takes the decode path"),
    GemmCase(name="m_4", M=4, N=80, K=72, layout="kn", why="last M of the decode path"),
    GemmCase(name="m_5", M=5, N=80, K=72, layout="kn", why="first M beyond the decode path"),
    GemmCase(name="odd", M=13, N=51, K=67, why="every blocking has a tail"),
    GemmCase(name="odd_kn", M=13, N=51, K=67, layout="kn", why="tails in the other layout"),
    GemmCase(name="odd_k_1", M=7, N=33, K=1, why="K below one pair of bf16"),
    GemmCase(name="n_1", M=17, N=1, K=65, why="one output column"),
    GemmCase(name="n_1_kn", M=17, N=1, K=65, layout="kn", why="weight rows of one element"),
    GemmCase(name="no_bias", M=9, N=40, K=48, bias=False, why="bias is optional"),
    GemmCase(name="fp32_bias", M=9, N=40, K=48, fp32_bias=True, why="bias wider than T"),
    GemmCase(name="gelu", M=(2, 11), N=70, K=64, activation="gelu", why="erf epilogue, 3-d x"),
    GemmCase(name="gelu_tanh", M=21, N=70, K=64, activation="gelu_tanh", why="tanh epilogue"),
    GemmCase(name="relu", M=21, N=70, K=64, activation="relu", why="relu epilogue"),
    GemmCase(
        name="all_kn",
        M=(3, 6),
        N=48,
        K=64,
        activation="gelu_tanh",
        residual=True,
        layout="kn",
        why="whole epilogue in the order activation, then residual",
    ),
    GemmCase(name="residual", M=(2, 2, 5), N=24, K=40, residual=True, why="4-d x with residual"),
    GemmCase(name="long_k", M=6, N=18, K=2100, why="K beyond one block: partial sums carried on"),
    GemmCase(name="blocks", M=70, N=130, K=300, why="several blocks in every direction"),
    GemmCase(name="dropout_odd", M=9, N=51, K=40, dropout_p=0.3, why="the shared mask, odd rows"),
    GemmCase(
        name="dropout_all",
        M=(3, 7),
        N=70,
        K=48,
        activation="gelu",
        residual=True,
        layout="kn",
        dropout_p=0.5,
        why="dropout between activation and residual",
    ),
    GemmCase(
        name="dropout_wide",
        M=2,
        N=1100,
        K=8,
        activation="relu",
        dropout_p=0.1,
        why="a row of random words longer than one buffer",
    ),
    GemmCase(name="vocabulary", M=3, N=50257, K=16, bias=False, why="odd vocabulary, odd rows"),
    *_model("111m_decode", 1, 768, "111M, one token"),
    *_model("111m_batch_4", 4, 768, "111M, four sequences decoded at once"),
    *_model("111m_512", 512, 768, "111M, 512-token prefill"),
    *_model("256m_512", 512, 1088, "256M: widths are no powers of two"),
    GemmCase(
        name="1b3_512_fc1",
        M=512,
        N=8192,
        K=2048,
        activation="gelu",
        layout="kn",
        use=(BENCH,),
        why="1.3B MLP up: weights beyond the last-level cache",
    ),
    GemmCase(
        name="head_decode",
        M=1,
        N=50257,
        K=768,
        bias=False,
        use=(BENCH,),
        why="LM head of one token: bandwidth only",
    ),
    GemmCase(
        name="linear_512", M=512, N=3072, K=768, use=(BENCH,), why="nn.Linear layout, prefill"
    ),
]

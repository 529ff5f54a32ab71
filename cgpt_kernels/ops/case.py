"""What a named case of an op offers to tests and benchmarks. The cases: ops/<op>/cases.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

TEST, BENCH = "test", "bench"
BOTH = (TEST, BENCH)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of one op with the reason it is in the table.

    Args:
        why: what would go unseen without it.
        use: "test" (small, run by the tests), "bench" (run by the benchmarks), or both.
    """

    op: ClassVar[str]
    name: str
    why: str
    use: tuple[str, ...] = (TEST,)

    def inputs(self, dtype: torch.dtype, device="cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of the op; the same values for one seed, rounded to dtype."""
        raise NotImplementedError

    @property
    def flops(self) -> int:
        """Floating-point operations that no algorithm avoids; a multiply-add counts 2."""
        raise NotImplementedError

    def bytes(self, dtype: torch.dtype) -> int:
        """Fewest bytes to move: each input read once, each output written once."""
        raise NotImplementedError

    def torch_call(self, inputs: dict[str, Any], wrap: Callable = lambda f: f) -> Callable:
        """The call as one writes it in torch today, which is what benchmarks compare with.

        Args:
            inputs: what inputs() gave.
            wrap: applied to the function once, e.g. torch.compile.
        """
        raise NotImplementedError

    @property
    def shape(self) -> str:
        """The numbers of the case, for reports: `M=512 N=3072 K=768`."""
        own = [f for f in fields(self) if f.name not in ("name", "why", "use")]
        values = ((f, getattr(self, f.name)) for f in own)
        return " ".join(f"{f.name}={v}" for f, v in values if f.default is not v)


class Random:
    """Seeded fp32 draws from a CPU generator, so that every device and dtype sees one set."""

    def __init__(self, seed: int, dtype: torch.dtype, device):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=self.generator) * std
        return values.to(self.device, dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def chance(self, p: float, *shape: int) -> Tensor:
        return (torch.rand(*shape, generator=self.generator) < p).to(self.device)

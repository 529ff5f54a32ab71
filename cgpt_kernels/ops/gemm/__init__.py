"""gemm."""

from .op import gemm
from .packed import PackedWeight, pack_weight

__all__ = ["PackedWeight", "gemm", "pack_weight"]

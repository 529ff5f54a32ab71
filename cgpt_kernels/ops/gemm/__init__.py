"""gemm."""

from .op import gemm

__all__ = ["gemm"]

"""gemm on the modelled grid of cores: see cgpt_kernels/wafer/ops.py."""

from ...wafer.ops import gemm_fwd

__all__ = ["gemm_fwd"]

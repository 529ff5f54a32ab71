"""gemm on the modelled grid of cores: see cgpt_kernels/wafer/backend.py."""

from ...wafer.backend import gemm_fwd

__all__ = ["gemm_fwd"]

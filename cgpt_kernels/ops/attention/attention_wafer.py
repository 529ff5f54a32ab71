"""attention on the modelled grid of cores: see cgpt_kernels/wafer/ops.py."""

from ...wafer.ops import attention_fwd

__all__ = ["attention_fwd"]

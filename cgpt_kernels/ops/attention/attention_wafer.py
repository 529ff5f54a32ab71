"""attention on the modelled grid of cores: see cgpt_kernels/wafer/backend.py."""

from ...wafer.backend import attention_fwd

__all__ = ["attention_fwd"]

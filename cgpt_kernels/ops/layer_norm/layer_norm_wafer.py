"""layer_norm on the modelled grid of cores: see cgpt_kernels/wafer/backend.py."""

from ...wafer.backend import layer_norm_fwd

__all__ = ["layer_norm_fwd"]

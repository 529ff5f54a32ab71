"""layer_norm on the modelled grid of cores: see cgpt_kernels/wafer/ops.py."""

from ...wafer.ops import layer_norm_fwd

__all__ = ["layer_norm_fwd"]

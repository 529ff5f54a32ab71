"""The ops: one folder each, holding the contract, the reference, the cases and what runs it."""

from .attention import attention
from .cross_entropy import linear_cross_entropy
from .gemm import gemm
from .layer_norm import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "attention", "gemm", "layer_norm", "linear_cross_entropy"]

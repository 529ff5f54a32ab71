"""The modelled wafer-scale engine: programs on a grid of cores, real values, honest cycles."""

from . import split
from .backend import record
from .collectives import collective
from .model import LLAMA3_8B, QWEN2_72B, Block, estimate, longest_decode
from .ops import attention, gemm, gemv, layer_norm
from .report import Report
from .spec import WSE2, WSE3, WaferSpec
from .validate import validate

__all__ = [
    "LLAMA3_8B",
    "QWEN2_72B",
    "WSE2",
    "WSE3",
    "Block",
    "Report",
    "WaferSpec",
    "attention",
    "collective",
    "estimate",
    "gemm",
    "gemv",
    "layer_norm",
    "longest_decode",
    "record",
    "split",
    "validate",
]

"""Fused kernels for GPT-2-class models: `ck.replace(model)` and the ops below it."""

from . import ops, prune, quantize, wafer
from .backends import explain
from .doctor import doctor
from .generate import generate
from .gpt import GPT, GPTConfig
from .replace import replace, restore

__all__ = [
    "GPT",
    "GPTConfig",
    "doctor",
    "explain",
    "generate",
    "ops",
    "prune",
    "quantize",
    "replace",
    "restore",
    "wafer",
]

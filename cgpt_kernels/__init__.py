"""Fused kernels for GPT-2-class models: `ck.replace(model)` and the ops below it."""

from . import ops
from .backends import explain
from .gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig", "explain", "ops"]

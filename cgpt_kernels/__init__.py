"""Fused kernels for GPT-2-class models: `ck.replace(model)` and the ops below it."""

from .gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]

"""linear_cross_entropy."""

from .op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]

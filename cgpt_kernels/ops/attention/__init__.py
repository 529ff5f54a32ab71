"""attention."""

from .op import attention

__all__ = ["attention"]

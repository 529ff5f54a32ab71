"""attention on the modelled grid of cores: see cgpt_kernels/wafer/backend.py."""

from ...wafer import backend
from ..philox import keep_mask


def attention_fwd(*arguments) -> None:
    """Arguments as `_C.attention_fwd`'s; the mask is drawn here, which all backends share."""
    *arguments, dropout_p, seed = arguments
    backend.attention_fwd(
        *arguments, dropout_p, lambda start, count: keep_mask(start, count, dropout_p, seed, "cpu")
    )


__all__ = ["attention_fwd"]

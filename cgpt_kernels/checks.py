"""Argument checks shared by the ops: one line naming the argument, what was expected, what came.

Every op runs the same checks on every backend, before any memory is touched.
"""

from __future__ import annotations

import torch

LOW_PRECISION = (torch.bfloat16, torch.float16)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def name_of(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def one_of(names) -> str:
    """`a, b or c`."""
    names = [str(n) for n in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def is_tensor(op: str, name: str, value, *, optional: bool = False, numpy: bool = True) -> None:
    """Raise TypeError unless value is a torch.Tensor (or None where optional).

    numpy: whether the caller turns NumPy arrays into tensors, for the message.
    """
    if isinstance(value, torch.Tensor) or (optional and value is None):
        return
    wanted = "a torch.Tensor" + " or a NumPy array" * numpy + " or None" * optional
    raise TypeError(f"{op}: {name} must be {wanted}, got {type(value).__name__}")


def has_dtype(
    op: str, name: str, tensor: torch.Tensor, *allowed: torch.dtype, why: str = ""
) -> None:
    """Raise TypeError unless the dtype is one of allowed; `why` says where those come from."""
    if tensor.dtype not in allowed:
        names = one_of(dict.fromkeys(name_of(d) for d in allowed))
        raise TypeError(f"{op}: {name} must be {names}{why}, got {name_of(tensor.dtype)}")


def has_rank(op: str, name: str, tensor: torch.Tensor, rank: int, letters: str) -> None:
    """Raise ValueError unless the tensor has this many dimensions."""
    if tensor.ndim != rank:
        raise ValueError(
            f"{op}: {name} must have {rank} dimensions {letters}, got shape {tuple(tensor.shape)}"
        )


def has_shape(op: str, name: str, tensor: torch.Tensor, shape: tuple, letters: str) -> None:
    """Raise ValueError unless the tensor has exactly this shape."""
    if tensor.shape != tuple(shape):
        wanted = ", ".join(str(int(s)) for s in shape) + ("," if len(shape) == 1 else "")
        raise ValueError(
            f"{op}: {name} must have shape ({wanted}) = {letters}, got {tuple(tensor.shape)}"
        )


def broadcasts_to(op: str, name: str, tensor: torch.Tensor, shape: tuple, letters: str) -> None:
    """Raise ValueError unless the tensor can be expanded to this shape."""
    own = tuple(tensor.shape)
    fits = len(own) <= len(shape) and all(
        a == b or a == 1 for a, b in zip(reversed(own), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{op}: {name} must be broadcastable to {tuple(shape)} = {letters}, got {own}"
        )


def same_device(op: str, first: str, tensors: dict[str, torch.Tensor | None]) -> None:
    """Raise ValueError unless all given tensors share the device of the one named first."""
    device = tensors[first].device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{op}: {name} must be on {device} as {first} is, got {tensor.device}; "
                f"move it with .to({str(device)!r})"
            )


def strided(op: str, tensors: dict[str, torch.Tensor | None]) -> None:
    """Raise TypeError for nested, sparse and other layouts without strides."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.is_nested or tensor.layout is not torch.strided):
            layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise TypeError(f"{op}: {name} must be a dense tensor, got layout {layout}")


def is_number(op: str, name: str, value, *, optional: bool = False) -> None:
    """Raise TypeError unless value is a number, or something that turns into one (or None where
    optional)."""
    if isinstance(value, (float, int)) or (optional and value is None):
        return
    if not hasattr(value, "__float__"):
        wanted = "a number" + (" or None" if optional else "")
        raise TypeError(f"{op}: {name} must be {wanted}, got {value!r}")


def is_choice(op: str, name: str, value, allowed) -> None:
    """Raise ValueError unless value is one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be {one_of(map(repr, allowed))}, got {value!r}")


def in_range(op: str, name: str, value, fits: bool, wanted: str) -> None:
    """Raise ValueError with the wanted range unless fits."""
    if not fits:
        raise ValueError(f"{op}: {name} must be {wanted}, got {value!r}")

"""Packed copies of projection weights, for inference: made at the first use, remade when the
parameter changes, given up by `restore`.

A copy lives on its module as `packed_copy`. Copies of float weights are derived data: pickles and
deep copies leave them out. With `keep_original=False` the copy is the only weight there is: the
parameter stays as a shape on the meta device, and the state_dict unpacks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from cgpt_kernels import backends
from cgpt_kernels.ops.gemm import PackedWeight, pack_weight

_fingerprint = getattr(backends._C, "fingerprint", None)


def packed_bytes(format: str, N: int, K: int, group: int | None) -> int:
    """Bytes of a packed weight [N, K]."""
    if backends._C is None:
        raise ValueError(f"a packed weight cannot be read: {backends._C_REASON}")
    return backends._C.packed_bytes(format, N, K, group or 0)


@dataclass(eq=False)
class Copy:
    """weight: None where memory was too short to pack. key: what the parameter was then."""

    weight: PackedWeight | None
    key: tuple | None
    only: bool = False  # the parameter's memory was given up
    requires_grad: bool = False  # what the parameter had, where it was given up

    def __reduce__(self):
        if self.only:
            return Copy, (self.weight, None, True, self.requires_grad)
        return _nothing, ()


def _nothing() -> None:
    return None


class Packable(nn.Module):
    """Mixed into the fused classes of nn.Linear and Conv1D, between them and nn.Module: what a
    packed weight changes in them.

    weight_layout: "nk" or "kn", how the class stores its weight.
    quantize: None for a float copy in the weight's own dtype, "int8" or "int4".
    """

    weight_layout: str
    quantize: str | None = None
    packed_copy: Copy | None = None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if given_up(self):
            destination[prefix + "weight"] = _unpacked(self)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        again = given_up(self) and prefix + "weight" in state_dict
        if again:
            bring_back(self)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if again:
            give_up(self)


def packed(module: nn.Module, weight: Tensor, x: Tensor, backend: str) -> PackedWeight | None:
    """The packed copy that should multiply x, or None where the weight itself should."""
    copy = module.packed_copy
    if copy is not None and copy.only:
        return copy.weight
    quantize = module.quantize
    if quantize is None and (
        torch.is_grad_enabled()
        or is_compiling()
        or backend not in ("auto", "cpu")
        or x.dtype is not weight.dtype
        or not x.is_cpu
        or not weight.is_cpu
    ):
        return None
    if is_compiling():  # made by `replace`; graphs cannot look at memory
        return copy.weight
    return current(module, weight)


def current(module: nn.Module, weight: Tensor) -> PackedWeight | None:
    """The copy of `weight` as it is now, packed if it is not yet; None where memory is short."""
    copy = module.packed_copy
    if copy is not None and copy.only:
        return copy.weight
    if _fingerprint is None or weight.is_inference():  # inference tensors count no versions
        return None
    key = (*state_of(weight), module.quantize)
    if copy is None or copy.key != key:
        made = None
        if weight.dtype in backends.KERNEL_DTYPES and (module.quantize or _room_for(weight)):
            made = pack_weight(weight, module.quantize, weight_layout=module.weight_layout)
        copy = module.packed_copy = Copy(made, key)
    return copy.weight


def state_of(weight: Tensor) -> tuple:
    """What differs once the weight has changed. The fingerprint, of the address and of elements all
    over the weight, tells changes through .data, which count no version."""
    if _fingerprint is not None and weight.is_cpu:
        return weight._version, _fingerprint(weight)
    return weight._version, weight.data_ptr()


def _room_for(weight: Tensor) -> bool:
    """Whether a second copy leaves memory for others; True where the system does not tell."""
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return True
    return found is None or 4 * weight.nbytes < 1024 * int(found[1])


def given_up(module: nn.Module) -> bool:
    """Whether the packed copy is the module's only weight."""
    copy = getattr(module, "packed_copy", None)
    return copy is not None and copy.only


def give_up(module: nn.Module) -> None:
    """Pack the weight and free the parameter's memory; its name, shape and dtype stay."""
    weight = module.weight
    made = pack_weight(weight, module.quantize, weight_layout=module.weight_layout)
    module.packed_copy = Copy(made, None, True, weight.requires_grad)
    module.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)


def bring_back(module: nn.Module) -> None:
    """Undo `give_up`: the parameter's values are those of the packed copy."""
    weight = nn.Parameter(_unpacked(module), requires_grad=module.packed_copy.requires_grad)
    module.packed_copy = None
    module.weight = weight


def _unpacked(module: nn.Module) -> Tensor:
    return module.packed_copy.weight.unpack(module.weight.dtype, module.weight_layout)


def tied(model: nn.Module) -> dict[int, type]:
    """{id of a parameter that several modules hold: nn.Embedding where one of them is one}."""
    holders: dict[int, list[type]] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                holders.setdefault(id(p), []).append(type(module))
    several = {p: held for p, held in holders.items() if len(held) > 1}
    return {p: nn.Embedding if nn.Embedding in held else held[0] for p, held in several.items()}


def copied_bytes(module: nn.Module) -> int:
    """Bytes of the module's packed copy, 0 without one."""
    copy = getattr(module, "packed_copy", None)
    return 0 if copy is None or copy.weight is None else copy.weight.nbytes

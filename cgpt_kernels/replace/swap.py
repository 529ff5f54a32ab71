"""What every adapter builds on: the marker of a replaced class and the pieces of a fused block.

A module is replaced by changing its class, never the object: `module.__class__` becomes a
module-level subclass whose forward calls the ops. Parameters, buffers, hooks, names and tying are
the object's own, so they stay. Going back means setting the class to the subclass's base.

A fused block may read a submodule's weights instead of calling it only where nobody could tell the
difference: exactly our class, no hooks, no patched forward, dense weights (`operands`), or such a
one under peft's LoRA adapters (`product`). Otherwise it calls the submodule, which keeps wrappers,
hooks and quantised weights of others working.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from cgpt_kernels import ops
from cgpt_kernels.decoder import Projection, kind_for
from cgpt_kernels.ops.gemm import pack_weight
from cgpt_kernels.ops.gemm.gemm_cuda import unsupported_packed
from cgpt_kernels.ops.gemm.packed import gemm as packed_gemm
from cgpt_kernels.replace.packing import current, given_up, packed

# Weights whose memory an op may read. Subclasses (quantised, sharded) bring their own arithmetic.
DENSE = frozenset((nn.Parameter, Tensor))


class Replaced:
    """Mixed into every fused class, after the class it replaces (Python assigns __class__ only
    between classes of one memory layout, which the first base sets).

    uses: names of the ops that the forward calls, which a backend asked for by name must offer.
    """

    uses: tuple[str, ...] = ()
    kernel_backend = "auto"  # any other is set on the instance: deepcopy and pickle carry it along

    @classmethod
    def original(cls) -> type[nn.Module]:
        """The class that this one replaces."""
        return next(c for c in cls.__mro__ if not issubclass(c, Replaced))

    @classmethod
    def unsuitable(cls, module: nn.Module) -> str | None:
        """Why `module`, an instance of `original()`, must stay as it is; None where it need not."""
        return None

    @classmethod
    def note(cls, module: nn.Module) -> str:
        """What a user should know about this replacement; usually nothing."""
        return ""


def unhooked(module: nn.Module) -> bool:
    """Whether calling `module` does nothing but its class's forward: no hooks, none patched in."""
    state = module.__dict__  # 40 % faster than attributes, and a block asks 11 times
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state  # accelerate puts its own forward on the instance
        or _global_forward_hooks  # hooks on every module of the process, as profilers set them
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    )


def plain(module: nn.Module, cls: type) -> bool:
    """Whether `module` is exactly `cls` and may be read past its __call__."""
    return type(module) is cls and unhooked(module)


def operands(module: nn.Module, cls: type) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) of a module that may be read past its __call__, else None."""
    if type(module) is not cls or not unhooked(module):
        return None
    return dense(module)


def dense(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) as stored; None where they are absent, computed or not plain memory."""
    parameters = module._parameters  # a plain dict: attribute access on modules costs 5 times more
    weight = parameters.get("weight")
    if type(weight) not in DENSE:
        return None
    return weight, parameters.get("bias")


class Product(NamedTuple):
    """What a projection multiplies by.

    linear: the fused module that holds the weight, and its packed copy.
    lora: None, or what ops.gemm takes: (A, B, scale), with x' where `of` has put it.
    dropout: applied to what A multiplies; None where it is idle.
    """

    linear: nn.Module
    weight: Tensor
    bias: Tensor | None
    lora: tuple | None = None
    dropout: nn.Module | None = None

    def of(self, x: Tensor) -> Product:
        """With x', what the dropout leaves of x, in lora."""
        if self.dropout is None:
            return self
        x_low = self.dropout(x.to(self.lora[0].dtype))  # cast first, as peft does
        return self._replace(lora=(*self.lora, x_low), dropout=None)


# Where the classes of LoRA layers live: peft is imported only by models that have one.
_LORA = frozenset(("peft.tuners.lora.layer", "cgpt_kernels.replace.peft_lora"))


def product(linear: nn.Module, cls: type, dtype: torch.dtype) -> Product | None:
    """What `linear`, a `cls` or one under LoRA adapters, multiplies inputs of this dtype by; None
    where it must be called."""
    wb = operands(linear, cls)
    if wb is not None:
        return Product(linear, *wb)
    if type(linear).__module__ not in _LORA:
        return None
    from cgpt_kernels.replace import peft_lora

    return peft_lora.read(linear, cls, dtype)


def lora_factors(model: nn.Module) -> set[nn.Module]:
    """The modules of LoRA's factors A and B. Products read their weights as they are, so that a
    packed copy would only take memory."""
    return {
        factor
        for layer in model.modules()
        if type(layer).__module__ in _LORA
        for name in ("lora_A", "lora_B")
        for factor in layer._modules.get(name, nn.ModuleDict()).children()
    }


def idle(dropout: nn.Module) -> bool:
    """Whether a dropout module passes its input through, unobserved."""
    kind = type(dropout)
    passes = kind is nn.Identity or (kind is nn.Dropout and not (dropout.training and dropout.p))
    return passes and unhooked(dropout)


def dropout_probability(dropout: nn.Module) -> float | None:
    """What an op may drop in place of a dropout module, 0.0 where it passes its input through; None
    where the module must be called."""
    if idle(dropout):
        return 0.0
    fused = type(dropout) is nn.Dropout and dropout.p < 1.0 and unhooked(dropout)
    return dropout.p if fused else None


def drops(by: Product) -> bool:
    """Whether the product's op can also drop elements: by a plain weight alone. A packed one is for
    inference, and beside LoRA factors torch's own dropout is the faster one."""
    return by.linear.quantize is None and not given_up(by.linear) and by.lora is None


def multiply(
    by: Product,
    x: Tensor,
    backend: str,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """ops.gemm by a product's weight, or by its packed copy. x [..., K] -> [..., N]."""
    linear, weight = by.linear, by.weight
    layout, copy = linear.weight_layout, None
    if dropout_p == 0.0:  # packed copies are for inference
        copy = packed(linear, weight, x, backend)
    if copy is not None:
        if by.lora is None:
            return packed_gemm(x, copy, by.bias, residual, activation, "nk", 0.0, None, backend)
        weight, layout = copy, "nk"
    return ops.gemm(
        x,
        weight,
        by.bias,
        activation=activation,
        residual=residual,
        lora=by.of(x).lora,
        weight_layout=layout,
        dropout_p=dropout_p,
        backend=backend,
    )


def project(linear: nn.Module, cls: type, x: Tensor, backend: str) -> Tensor:
    """linear(x) through the op where possible. x [..., K] -> [..., N].

    cls: the fused class that `linear` must have.
    """
    by = product(linear, cls, x.dtype)
    if by is None:
        return linear(x)
    return multiply(by, x, backend)


def project_activate(
    linear: nn.Module, cls: type, x: Tensor, activation: Callable, name: str | None, backend: str
) -> Tensor:
    """activation(linear(x)) in one op where possible. x [..., K] -> [..., N].

    name: what ops.gemm calls this activation; None where it has none or must be called.
    """
    by = product(linear, cls, x.dtype)
    if by is None:
        return activation(linear(x))
    if name is None:
        return activation(multiply(by, x, backend))
    return multiply(by, x, backend, activation=name)


def project_add(
    linear: nn.Module, cls: type, x: Tensor, residual: Tensor, dropout: nn.Module, backend: str
) -> tuple[Tensor, bool]:
    """dropout(linear(x)), with the residual added where one op can do both.

    Returns (y [..., N], whether the residual is in it); `norm_sum` or the caller adds it otherwise.
    """
    by = product(linear, cls, x.dtype)
    if by is None:
        return dropout(linear(x)), False
    p = dropout_probability(dropout)
    if p is not None and residual.dtype is x.dtype and not (p and not drops(by)):
        return multiply(by, x, backend, residual=residual, dropout_p=p), True
    return dropout(multiply(by, x, backend)), False


def projection(linear: nn.Module, cls: type, kind: str) -> Projection | None:
    """What a decoder multiplies by in place of `linear`; None where it must be called.

    kind: the decoder's backend; "cuda" takes int8 and int4 copies alone.
    """
    held = linear.base_layer if type(linear).__module__ in _LORA else linear
    by = product(linear, cls, held.weight.dtype)
    if by is None or by.dropout is not None:
        return None
    bias = None if by.bias is None else by.bias.detach()
    if kind == "cuda":
        weight, lora = by.weight.detach(), by.lora
        if lora is not None:
            A, B, scale = lora
            lora = A.detach().to(weight.dtype), (B.detach().float() * scale).to(weight.dtype)
        if by.linear.quantize is not None or given_up(by.linear):
            copy = current(by.linear, weight)
            if copy is None or unsupported_packed(weight, copy.format):
                return None
            weight = copy
        return Projection(weight, bias, cls.weight_layout, lora)
    if not (by.linear.packed_copy or by.weight.is_cpu):
        return None
    weight = current(by.linear, by.weight) or by.weight.detach()
    lora = by.lora
    if lora is not None:
        A, B, scale = lora
        lora = pack_weight(A), B.detach().float(), scale
    return Projection(weight, bias, cls.weight_layout, lora)


def table(embedding: nn.Module) -> Tensor | None:
    """The rows of a plain nn.Embedding; None where it must be called."""
    if not plain(embedding, nn.Embedding) or embedding.max_norm is not None:
        return None
    wb = dense(embedding)
    return None if wb is None else wb[0].detach()


def decoder_kind(blocks: Iterable[nn.Module], wte: Tensor) -> str | None:
    """The backend whose decoder runs these replaced blocks; None where their modules must."""
    kinds = {kind_for(getattr(block, "kernel_backend", ""), wte) for block in blocks}
    return kinds.pop() if len(kinds) == 1 else None


def norm(ln: nn.Module, cls: type, x: Tensor, backend: str) -> Tensor:
    """ln(x) through the op where possible. x [..., C] -> [..., C]."""
    wb = operands(ln, cls)
    if wb is None:
        return ln(x)
    return ops.layer_norm(x, wb[0], wb[1], eps=ln.eps, backend=backend)


def norm_sum(
    ln: nn.Module, cls: type, x: Tensor, added: bool, residual: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """(ln(s), s) with s = x where `added` (x is the sum already), else x + residual."""
    if added:
        return norm(ln, cls, x, backend), x
    wb = operands(ln, cls)
    if wb is None or residual.dtype is not x.dtype:
        x = x + residual
        return norm(ln, cls, x, backend), x
    return ops.add_layer_norm(x, residual, wb[0], wb[1], eps=ln.eps, backend=backend)

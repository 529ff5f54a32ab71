"""peft's LoRA layers: the base product and the active adapters' low-rank part in one gemm.

A replaced model meets them in both orders. Where `replace` comes after get_peft_model, peft's
wrapper changes class as any other module does. Where it comes before, peft wraps modules that are
fused already; the fused blocks around them know peft's wrapper by its class and read it.

Only what one product can carry is read past peft's forward (`read`): plain LoRA, any number of
active adapters, scaling, lora_bias, dropout of one adapter, merged and disabled states. Anything
else (DoRA and other variants, a batch that mixes adapters) runs peft's own forward on the fused
base layer.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from cgpt_kernels.replace.packing import Packable, given_up
from cgpt_kernels.replace.swap import Product, Replaced, dense, idle, multiply, operands, unhooked
from cgpt_kernels.replace.torch_nn import FusedLinear

_FACTORS = (nn.Linear, FusedLinear)  # what A and B may be


class FusedLoraLinear(LoraLinear, Replaced):
    uses = ("gemm",)

    @classmethod
    def unsuitable(cls, module):
        variants = [f"{n!r} ({type(v).__name__})" for n, v in module.lora_variant.items()]
        if variants:
            return f"adapter {', '.join(variants)} is more than a low-rank sum; peft's forward runs"
        return None

    def forward(self, x: Tensor, *args, **kwargs):
        found = None
        if not args and not kwargs:  # peft mixes adapters within a batch through kwargs
            base = self._modules["base_layer"]
            found = _read(self, type(base), x.dtype) if isinstance(base, Packable) else None
        if found is None:
            return super().forward(x, *args, **kwargs)
        return multiply(found.of(x), x, self.kernel_backend)


def read(layer: nn.Module, cls: type, dtype: torch.dtype) -> Product | None:
    """What a LoRA layer on a `cls` multiplies inputs of this dtype by; None where it must be
    called."""
    if type(layer) not in (LoraLinear, FusedLoraLinear) or not unhooked(layer):
        return None
    return _read(layer, cls, dtype)


def _read(layer: LoraLinear, cls: type, dtype: torch.dtype) -> Product | None:
    parts = layer._modules
    base = parts["base_layer"]
    wb = operands(base, cls)
    if wb is None:
        return None
    if layer.merged_adapters:
        # Disabled while merged: peft's forward unmerges first.
        return None if layer._disable_adapters else Product(base, *wb)
    if layer._disable_adapters:
        return Product(base, *wb)

    downs, ups = parts["lora_A"]._modules, parts["lora_B"]._modules
    names = [name for name in layer.active_adapters if name in downs]
    if not names:
        return Product(base, *wb)
    weight, bias = wb
    factors = []
    for name in names:
        a, b = _factor(downs[name]), _factor(ups[name])
        scale = layer.scaling[name]
        if name in layer.lora_variant or a is None or b is None or type(scale) not in (float, int):
            return None
        if a[0].dtype not in (dtype, torch.float32) or a[0].dtype is not b[0].dtype:
            return None
        if a[0].dtype is not dtype and not layer.cast_input_dtype_enabled:
            return None
        if b[1] is not None:  # lora_bias
            bias = b[1] * scale if bias is None else bias + b[1] * scale
        factors.append((a[0], b[0], float(scale)))
    dropout = parts["lora_dropout"]._modules[names[0]]
    if len(names) == 1:
        return Product(base, weight, bias, factors[0], None if idle(dropout) else dropout)
    if not all(idle(parts["lora_dropout"]._modules[name]) for name in names):
        return None  # each adapter drops other elements of x
    if len({a.dtype for a, _, _ in factors}) > 1:
        return None
    A = torch.cat([a for a, _, _ in factors])
    B = torch.cat([b * scale for _, b, scale in factors], 1)
    return Product(base, weight, bias, (A, B, 1.0))


def _factor(linear: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) of lora_A or lora_B; None where it must be called."""
    readable = type(linear) in _FACTORS and unhooked(linear)
    return dense(linear) if readable and not given_up(linear) else None


def base_model(model: nn.Module) -> nn.Module | None:
    """The model inside peft's LoRA wrappers where they do nothing but call it, else None."""
    config = model.peft_config.get(model.active_adapter)
    if config is None or config.is_prompt_learning or not unhooked(model):
        return None
    return model.base_model.model if unhooked(model.base_model) else None


CLASSES = {FusedLoraLinear.original(): FusedLoraLinear}

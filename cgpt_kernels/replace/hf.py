"""What Hugging Face models share: attention as their "sdpa" and "eager" implementations define it.

B batch, S queries, T keys (cached + new), H heads, D head size.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import activations
from transformers.cache_utils import Cache, EncoderDecoderCache

from cgpt_kernels import ops
from cgpt_kernels.replace.swap import unhooked

# Keyword arguments that change what "sdpa" computes. Others (position_ids, use_cache) are carried
# through every layer for other implementations, which read them.
_CHANGES_ATTENTION = frozenset(("is_causal", "position_bias", "cache", "softcap"))

# gelu, gelu_python; gelu_new; gelu_pytorch_tanh, gelu_python_tanh; gelu_accurate; relu
_ACTIVATIONS = {
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
}


def activation_name(act) -> str | None:
    """ops.gemm's name for one of transformers' activation modules, None where it must be called."""
    name = _ACTIVATIONS.get(type(act))
    return name if name is not None and unhooked(act) else None


def implementation(config) -> str | None:
    """config._attn_implementation: "sdpa", "eager", "flash_attention_2", ..."""
    if is_compiling():  # the compiler cannot follow object.__getattribute__
        return config._attn_implementation
    try:
        # The property costs over 1 us per read: transformers' configs route every attribute
        # through Python.
        return object.__getattribute__(config, "_attn_implementation_internal")
    except AttributeError:
        return config._attn_implementation


def attention_note(config) -> str:
    """What a user should know where this implementation is not ours to compute."""
    kind = implementation(config)
    if kind in ("sdpa", "eager"):
        return ""
    return f"attn_implementation={kind!r} runs as it is, on the replaced projections"


def expressible(kind: str | None, mask: Tensor | None, kwargs: dict) -> bool:
    """Whether ops.attention computes what this implementation would for this mask and kwargs."""
    if kind != "sdpa" and kind != "eager":
        return False
    if mask is not None and not (
        type(mask) is Tensor
        and mask.dim() == 4
        # "eager" adds whatever it gets: 1 where a bool mask keeps
        and ((mask.dtype is torch.bool and kind == "sdpa") or mask.is_floating_point())
    ):
        return False
    return _CHANGES_ATTENTION.isdisjoint(kwargs)


def given_cache(past_key_values, kwargs: dict):
    """The KV cache of a call: past_key_values, or what kwargs hold by the name that it has since
    transformers 5.24, which is taken out of them."""
    if isinstance(kwargs.get("cache"), Cache):
        return kwargs.pop("cache")
    if "cache" in kwargs and kwargs["cache"] is None:
        del kwargs["cache"]
    return past_key_values


def cache_name(forward) -> str:
    """What a forward of transformers calls its KV cache: the older name brings a warning."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def update_cache(cache, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Append k, v [B, H, S, D] to the cache; returns all keys and values [B, H, T, D]."""
    if cache is None:
        return k, v
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return cache.update(k, v, layer)


def attend(
    kind: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    backend: str,
) -> Tensor:
    """Self-attention, q [B, H, S, D], k, v [B, H, T, D] -> [B, S, H * D].

    mask: as the model made it, [B or 1, 1, S, T]: bool True keeps, floating is added; None for
        "sdpa" means causal where the module is, for "eager" no mask at all.
    """
    B, H, S, D = q.shape
    causal = mask is None and is_causal and kind == "sdpa" and S > 1
    if causal and k.shape[2] > S:
        # An empty static cache: the keys after the S new ones are not written yet, and "sdpa"
        # aligns causal top-left, where ops.attention aligns it bottom-right.
        k, v = k[:, :, :S], v[:, :, :S]
    y = ops.attention(
        q, k, v, causal=causal, attn_bias=mask, scale=scale, dropout_p=dropout_p, backend=backend
    )
    return y.transpose(1, 2).reshape(B, S, H * D)

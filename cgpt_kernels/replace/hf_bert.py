"""Hugging Face BERT: bidirectional attention with padding masks, post-norm blocks.

A layer becomes gemm (q), gemm (k), gemm (v), attention, gemm + residual, layer_norm, gemm + GELU,
gemm + residual, layer_norm. Decoders with a KV cache run too; cross-attention stays as it is.

B batch, S tokens, C width, H heads, D = C / H.
"""

from __future__ import annotations

from torch import Tensor
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertIntermediate,
    BertLayer,
    BertOutput,
    BertPredictionHeadTransform,
    BertSelfAttention,
    BertSelfOutput,
)

from cgpt_kernels.replace.hf import (
    activation_name,
    attend,
    attention_note,
    cache_name,
    expressible,
    given_cache,
    implementation,
    update_cache,
)
from cgpt_kernels.replace.swap import (
    Replaced,
    norm_sum,
    plain,
    project,
    project_activate,
    project_add,
)
from cgpt_kernels.replace.torch_nn import FusedLayerNorm, FusedLinear

_CACHE = cache_name(BertLayer.forward)


class FusedBertSelfAttention(BertSelfAttention, Replaced):
    """Called as a module it keeps the contract of BertSelfAttention, attention weights included:
    where the implementation is "eager", which returns them, the original forward runs."""

    uses = ("gemm", "attention")

    @classmethod
    def note(cls, module):
        return attention_note(module.config)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        past_key_values = given_cache(past_key_values, kwargs)
        if implementation(self.config) != "sdpa" or not expressible("sdpa", attention_mask, kwargs):
            return super().forward(hidden_states, attention_mask, past_key_values, **kwargs)
        return _heads(self, "sdpa", hidden_states, past_key_values, attention_mask), None


class FusedBertSelfOutput(BertSelfOutput, Replaced):
    uses = ("gemm", "layer_norm")

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return _add_norm(self, hidden_states, input_tensor)


class FusedBertIntermediate(BertIntermediate, Replaced):
    uses = ("gemm",)

    @classmethod
    def note(cls, module):
        act = module.intermediate_act_fn
        return "" if activation_name(act) else f"{type(act).__name__} is not fused"

    def forward(self, hidden_states: Tensor) -> Tensor:
        act = self.intermediate_act_fn
        return project_activate(
            self._modules["dense"],
            FusedLinear,
            hidden_states,
            act,
            activation_name(act),
            self.kernel_backend,
        )


class FusedBertOutput(BertOutput, Replaced):
    uses = ("gemm", "layer_norm")

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return _add_norm(self, hidden_states, input_tensor)


class FusedBertPredictionHeadTransform(BertPredictionHeadTransform, Replaced):
    uses = ("gemm",)

    def forward(self, hidden_states: Tensor) -> Tensor:
        act, backend = self.transform_act_fn, self.kernel_backend
        name = activation_name(act)
        y = project_activate(self._modules["dense"], FusedLinear, hidden_states, act, name, backend)
        return self.LayerNorm(y)


class FusedBertLayer(BertLayer, Replaced):
    """Only so that "eager" attention is fused as well: inside a layer nobody sees the weights."""

    uses = ("gemm", "attention", "layer_norm")

    @classmethod
    def note(cls, module):
        if hasattr(module, "crossattention"):
            return "with encoder_hidden_states the original forward runs, on the replaced parts"
        return ""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        past_key_values = given_cache(past_key_values, kwargs)
        outer = self._modules["attention"]
        attn = outer._modules["self"]
        kind = implementation(attn.config) if plain(attn, FusedBertSelfAttention) else None
        if (
            kind != "eager"
            or encoder_hidden_states is not None
            or self.chunk_size_feed_forward
            or not plain(outer, BertAttention)
            or not expressible(kind, attention_mask, kwargs)
        ):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                **{_CACHE: past_key_values},
                **kwargs,
            )
        y = _heads(attn, kind, hidden_states, past_key_values, attention_mask)
        y = outer._modules["output"](y, hidden_states)
        return self.feed_forward_chunk(y)


def _heads(attn, kind: str, x: Tensor, cache, mask: Tensor | None) -> Tensor:
    """The heads' outputs side by side. x [B, S, C] -> [B, S, C]."""
    parts, backend = attn._modules, attn.kernel_backend
    B, S, _ = x.shape
    H, D = attn.num_attention_heads, attn.attention_head_size
    q, k, v = [
        project(parts[name], FusedLinear, x, backend).view(B, S, H, D).transpose(1, 2)  # B H S D
        for name in ("query", "key", "value")
    ]
    k, v = update_cache(cache, k, v, attn.layer_idx)
    return attend(
        kind,
        q,
        k,
        v,
        mask,
        is_causal=attn.is_causal,
        scale=attn.scaling,
        dropout_p=parts["dropout"].p if attn.training else 0.0,
        backend=backend,
    )


def _add_norm(module: BertSelfOutput | BertOutput, x: Tensor, residual: Tensor) -> Tensor:
    """LayerNorm(dropout(dense(x)) + residual), x [B, S, K], residual [B, S, C] -> [B, S, C]."""
    parts, backend = module._modules, module.kernel_backend
    y, added = project_add(parts["dense"], FusedLinear, x, residual, parts["dropout"], backend)
    return norm_sum(parts["LayerNorm"], FusedLayerNorm, y, added, residual, backend)[0]


CLASSES = {
    cls.original(): cls
    for cls in (
        FusedBertSelfAttention,
        FusedBertSelfOutput,
        FusedBertIntermediate,
        FusedBertOutput,
        FusedBertPredictionHeadTransform,
        FusedBertLayer,
    )
}

"""Hugging Face GPT-2: GPT2Model, GPT2LMHeadModel, GPT2ForSequenceClassification and the like.

A block becomes six ops: layer_norm, gemm (q, k, v), attention, gemm + residual, layer_norm,
gemm + GELU, gemm + residual. Conv1D weights stay [in, out].

B batch, S queries, T keys, C width, H heads, D = C / H.
"""

from __future__ import annotations

from torch import Tensor
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2MLP,
    GPT2Attention,
    GPT2Block,
    GPT2Model,
)
from transformers.pytorch_utils import Conv1D

from cgpt_kernels import decoder
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
from cgpt_kernels.replace.hf_gpt2_head import FusedGPT2LMHeadModel
from cgpt_kernels.replace.packing import Packable
from cgpt_kernels.replace.swap import (
    Product,
    Replaced,
    decoder_kind,
    dense,
    idle,
    multiply,
    norm,
    norm_sum,
    operands,
    plain,
    project,
    project_activate,
    project_add,
    projection,
    table,
)
from cgpt_kernels.replace.torch_nn import FusedLayerNorm, FusedLinear

_CACHE = cache_name(GPT2Block.forward)


class FusedConv1D(Conv1D, Packable, Replaced):
    uses = ("gemm",)
    weight_layout = "kn"

    @classmethod
    def unsuitable(cls, module):
        return None if dense(module) else f"its weight is a {type(module.weight).__name__}"

    def forward(self, x: Tensor) -> Tensor:
        wb = dense(self)
        if wb is None:
            return super().forward(x)
        return multiply(Product(self, *wb), x, self.kernel_backend)


class FusedGPT2Attention(GPT2Attention, Replaced):
    """Called as a module it keeps the contract of GPT2Attention, attention weights included: where
    the implementation is "eager", which returns them, the original forward runs."""

    uses = ("gemm", "attention")

    @classmethod
    def unsuitable(cls, module):
        if module.is_cross_attention:
            return "cross-attention runs its own forward"
        return None

    @classmethod
    def note(cls, module):
        if module.reorder_and_upcast_attn and implementation(module.config) == "eager":
            return "reorder_and_upcast_attn runs the original attention"
        return attention_note(module.config)

    def forward(
        self,
        hidden_states,
        past_key_values=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        output_attentions=False,
        **kwargs,
    ):
        past_key_values = given_cache(past_key_values, kwargs)
        if (
            encoder_hidden_states is not None
            or output_attentions
            or implementation(self.config) != "sdpa"
            or not expressible("sdpa", attention_mask, kwargs)
        ):
            return super().forward(
                hidden_states,
                **{_CACHE: past_key_values},
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                output_attentions=output_attentions,
                **kwargs,
            )
        y = _heads(
            self, "sdpa", hidden_states, past_key_values, attention_mask, self.kernel_backend
        )
        y = project(self._modules["c_proj"], FusedConv1D, y, self.kernel_backend)
        return self.resid_dropout(y), None


class FusedGPT2MLP(GPT2MLP, Replaced):
    uses = ("gemm",)

    @classmethod
    def note(cls, module):
        return "" if activation_name(module.act) else f"{type(module.act).__name__} is not fused"

    def forward(self, hidden_states: Tensor) -> Tensor:
        y = _hidden(self, hidden_states, self.kernel_backend)
        return self.dropout(project(self._modules["c_proj"], FusedConv1D, y, self.kernel_backend))


class FusedGPT2Block(GPT2Block, Replaced):
    uses = ("layer_norm", "gemm", "attention")

    @classmethod
    def note(cls, module):
        if hasattr(module, "crossattention"):
            return "with encoder_hidden_states the original forward runs, on the replaced parts"
        return ""

    def forward(
        self,
        hidden_states,
        past_key_values=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        use_cache=False,
        **kwargs,
    ):
        past_key_values = given_cache(past_key_values, kwargs)
        if encoder_hidden_states is not None:
            return super().forward(
                hidden_states,
                **{_CACHE: past_key_values},
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                **kwargs,
            )
        parts, backend = self._modules, self.kernel_backend
        attn, mlp = parts["attn"], parts["mlp"]
        kind = implementation(attn.config)

        x = norm(parts["ln_1"], FusedLayerNorm, hidden_states, backend)
        if (
            plain(attn, FusedGPT2Attention)
            and expressible(kind, attention_mask, kwargs)
            and not (kind == "eager" and attn.reorder_and_upcast_attn)
        ):
            inner = attn._modules
            y = _heads(attn, kind, x, past_key_values, attention_mask, backend)
            y, added = project_add(
                inner["c_proj"], FusedConv1D, y, hidden_states, inner["resid_dropout"], backend
            )
        else:
            y, _ = attn(
                x,
                **{_CACHE: past_key_values},
                attention_mask=attention_mask,
                use_cache=use_cache,
                **kwargs,
            )
            added = False
        x, residual = norm_sum(parts["ln_2"], FusedLayerNorm, y, added, hidden_states, backend)

        if not plain(mlp, FusedGPT2MLP):
            return residual + mlp(x)
        inner = mlp._modules
        y = _hidden(mlp, x, backend)
        y, added = project_add(inner["c_proj"], FusedConv1D, y, residual, inner["dropout"], backend)
        return y if added else residual + y


def _heads(attn, kind: str, x: Tensor, cache, mask: Tensor | None, backend: str) -> Tensor:
    """The heads' outputs side by side, before c_proj. x [B, S, C] -> [B, S, C]."""
    B, S, _ = x.shape
    qkv = project(attn._modules["c_attn"], FusedConv1D, x, backend)
    q, k, v = qkv.view(B, S, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)  # B H S D
    k, v = update_cache(cache, k, v, attn.layer_idx)
    return attend(
        kind,
        q,
        k,
        v,
        mask,
        is_causal=attn.is_causal,
        scale=attn.scaling,
        dropout_p=attn._modules["attn_dropout"].p if attn.training else 0.0,
        backend=backend,
    )


def _hidden(mlp, x: Tensor, backend: str) -> Tensor:
    """act(c_fc(x)), [B, S, C] -> [B, S, n_inner]."""
    inner = mlp._modules
    act = inner["act"]
    return project_activate(inner["c_fc"], FusedConv1D, x, act, activation_name(act), backend)


def decoder_parts(model) -> decoder.Parts | None:
    """What a decoder of this model is made of; None where only the modules can run it."""
    if not plain(model, FusedGPT2LMHeadModel) or not plain(model.transformer, GPT2Model):
        return None
    top, head = model.transformer._modules, model._modules["lm_head"]
    wte, wpe = table(top["wte"]), table(top["wpe"])
    if wte is None or wpe is None or not idle(top["drop"]):
        return None
    kind = decoder_kind(top["h"], wte)
    if kind is None:
        return None
    norm, head = operands(top["ln_f"], FusedLayerNorm), projection(head, FusedLinear, kind)
    layers = [_decoder_layer(block, kind) for block in top["h"]]
    acts = {activation_name(block.mlp.act) for block in top["h"]}
    eps = {ln.eps for block in top["h"] for ln in (block.ln_1, block.ln_2)} | {top["ln_f"].eps}
    if norm is None or head is None or None in layers:
        return None
    if None in acts or len(acts) != 1 or len(eps) != 1:
        return None
    heads = model.config.n_head
    return decoder.Parts(wte, wpe, layers, norm, head, heads, eps.pop(), acts.pop(), kind)


def _decoder_layer(block, kind: str) -> decoder.Layer | None:
    parts = block._modules
    attn, mlp = parts["attn"], parts["mlp"]
    if not (
        plain(block, FusedGPT2Block)
        and plain(attn, FusedGPT2Attention)
        and plain(mlp, FusedGPT2MLP)
        and not (attn.training and attn._modules["attn_dropout"].p)
        and idle(attn._modules["resid_dropout"])
        and idle(mlp._modules["dropout"])
        and attn.is_causal
        and expressible(implementation(attn.config), None, {})
        and not attn.reorder_and_upcast_attn
    ):
        return None
    found = (
        operands(parts["ln_1"], FusedLayerNorm),
        projection(attn._modules["c_attn"], FusedConv1D, kind),
        projection(attn._modules["c_proj"], FusedConv1D, kind),
        operands(parts["ln_2"], FusedLayerNorm),
        projection(mlp._modules["c_fc"], FusedConv1D, kind),
        projection(mlp._modules["c_proj"], FusedConv1D, kind),
    )
    return None if None in found else decoder.Layer(attn.scaling, *found)


CLASSES = {
    cls.original(): cls
    for cls in (FusedConv1D, FusedGPT2Attention, FusedGPT2MLP, FusedGPT2Block, FusedGPT2LMHeadModel)
}

"""torch's own modules in any tree: LayerNorm, Linear, MultiheadAttention, TransformerEncoderLayer.

B batch, L queries, S keys, E width, H heads, D = E / H.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from cgpt_kernels import checks, ops
from cgpt_kernels.ops.gemm.packed import gemm as packed_gemm
from cgpt_kernels.replace.packing import Packable, packed
from cgpt_kernels.replace.swap import (
    DENSE,
    Replaced,
    dense,
    dropout_probability,
    idle,
    norm,
    norm_sum,
    plain,
    project_activate,
    project_add,
    unhooked,
)


class FusedLayerNorm(nn.LayerNorm, Replaced):
    uses = ("layer_norm",)

    @classmethod
    def unsuitable(cls, module):
        if len(module.normalized_shape) != 1:
            return f"normalises over {len(module.normalized_shape)} dimensions, not only the last"
        if module.weight is None:
            return "has no weight (elementwise_affine=False)"
        return None if dense(module) else f"its weight is a {type(module.weight).__name__}"

    def forward(self, x: Tensor) -> Tensor:
        wb = dense(self)
        if wb is None or x.is_nested:
            return super().forward(x)
        return ops.layer_norm(x, wb[0], wb[1], eps=self.eps, backend=self.kernel_backend)


class FusedLinear(nn.Linear, Packable, Replaced):
    uses = ("gemm",)
    weight_layout = "nk"

    @classmethod
    def unsuitable(cls, module):
        if not dense(module):
            return f"its weight is a {type(module.weight).__name__}"
        dtype = module.weight.dtype
        return None if dtype in checks.FLOATING else f"its weight is {checks.name_of(dtype)}"

    def forward(self, x: Tensor) -> Tensor:
        wb = dense(self)
        if wb is None or x.is_nested:
            return super().forward(x)
        copy = packed(self, wb[0], x, self.kernel_backend)  # multiply, written out
        if copy is None:
            return ops.gemm(x, wb[0], wb[1], backend=self.kernel_backend)
        return packed_gemm(x, copy, wb[1], None, None, "nk", 0.0, None, self.kernel_backend)


class FusedMultiheadAttention(nn.MultiheadAttention, Replaced):
    """Without attention weights (need_weights=False); with them, torch's own forward runs."""

    uses = ("gemm", "attention")

    @classmethod
    def unsuitable(cls, module):
        if not module._qkv_same_embed_dim:
            return "kdim or vdim differs from embed_dim"
        if module.bias_k is not None:
            return "add_bias_kv=True appends a learned key and value"
        if module.add_zero_attn:
            return "add_zero_attn=True appends a key and value of zeros"
        if type(module.out_proj) is not NonDynamicallyQuantizableLinear:
            return f"its out_proj is a {type(module.out_proj).__name__}"
        return None if _dense_projections(module) else "its weights are not plain tensors"

    @classmethod
    def note(cls, module):
        return "need_weights=True runs torch's forward"

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        if (
            need_weights
            or query.dim() != 3
            or query.is_nested
            or key.is_nested
            or value.is_nested
            or not _masks_fit(self, query, key, attn_mask, key_padding_mask, is_causal)
            or not _dense_projections(self)
        ):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        heads = _heads(self, query, key, value, attn_mask, key_padding_mask, is_causal)
        out = self._modules["out_proj"]
        y = ops.gemm(heads, out.weight, out.bias, backend=self.kernel_backend)
        return y, None


class FusedTransformerEncoderLayer(nn.TransformerEncoderLayer, Replaced):
    uses = ("layer_norm", "gemm", "attention")

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        parts = self._modules
        mha = parts["self_attn"]
        if (
            src.dim() != 3
            or src.is_nested
            or not plain(mha, FusedMultiheadAttention)
            or not _masks_fit(mha, src, src, src_mask, src_key_padding_mask, is_causal)
            or not _dense_projections(mha)
        ):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        backend = self.kernel_backend
        norm1, norm2 = parts["norm1"], parts["norm2"]

        x = norm(norm1, FusedLayerNorm, src, backend) if self.norm_first else src
        heads = _heads(mha, x, x, x, src_mask, src_key_padding_mask, is_causal)
        y, added = _add_out_proj(mha, heads, src, parts["dropout1"], backend)
        after_attention = norm2 if self.norm_first else norm1
        y, x = norm_sum(after_attention, FusedLayerNorm, y, added, src, backend)
        if not self.norm_first:
            x = y  # post-norm: the normalised sum is also the residual stream
        y, added = _feed_forward(self, y, x)
        if self.norm_first:
            return y if added else x + y
        return norm_sum(norm2, FusedLayerNorm, y, added, x, backend)[0]


def _feed_forward(layer: FusedTransformerEncoderLayer, y: Tensor, x: Tensor):
    """(dropout2(linear2(dropout(activation(linear1(y))))), whether x was added to it)."""
    parts, backend = layer._modules, layer.kernel_backend
    act = layer.activation
    y = project_activate(parts["linear1"], FusedLinear, y, act, activation_name(act), backend)
    if not idle(parts["dropout"]):
        y = parts["dropout"](y)
    return project_add(parts["linear2"], FusedLinear, y, x, parts["dropout2"], backend)


def activation_name(activation) -> str | None:
    """ops.gemm's name for a torch activation (function or module), None where it has none."""
    kind = type(activation)
    if kind is nn.ReLU:
        return "relu" if unhooked(activation) else None
    if kind is nn.GELU and unhooked(activation):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if activation is nn.functional.relu or activation is torch.relu:
        return "relu"
    return "gelu" if activation is nn.functional.gelu else None


def _dense_projections(mha: nn.MultiheadAttention) -> bool:
    out = mha._modules["out_proj"]
    packed = mha._parameters.get("in_proj_weight")
    return (
        type(packed) in DENSE
        and type(out) is NonDynamicallyQuantizableLinear
        and dense(out) is not None
    )


def _masks_fit(mha, query, key, attn_mask, key_padding_mask, is_causal) -> bool:
    """Whether the op can express the masks; torch's forward handles, or rejects, all others."""
    if is_causal:  # a hint that attn_mask is the causal mask; torch demands the mask beside it
        length = 1 if mha.batch_first else 0
        if attn_mask is None or query.shape[length] != key.shape[length]:
            return False
    if attn_mask is not None and not (_mask_dtype(attn_mask) and attn_mask.dim() in (2, 3)):
        return False
    return key_padding_mask is None or (
        _mask_dtype(key_padding_mask) and key_padding_mask.dim() == 2
    )


def _mask_dtype(mask: Tensor) -> bool:
    return mask.dtype is torch.bool or mask.is_floating_point()


def _heads(mha, query, key, value, attn_mask, key_padding_mask, is_causal) -> Tensor:
    """The attention output before out_proj, [B, L, E] or (not batch_first) [L, B, E]."""
    weight, bias = mha._parameters["in_proj_weight"], mha._parameters.get("in_proj_bias")
    backend, E, H = mha.kernel_backend, mha.embed_dim, mha.num_heads
    first, second, _ = query.shape
    heads_of = (0, 2, 1, 3) if mha.batch_first else (1, 2, 0, 3)  # [., ., H, D] -> [B, H, ., D]

    def split(x: Tensor, n: int, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        y = ops.gemm(x, w, b, backend=backend)
        y = y.view(y.shape[0], y.shape[1], n, H, E // H)
        return tuple(part.permute(heads_of) for part in y.unbind(2))

    def rows(start: int, stop: int):
        return weight[start:stop], None if bias is None else bias[start:stop]

    if query is key and key is value:
        q, k, v = split(query, 3, weight, bias)
    else:
        (q,) = split(query, 1, *rows(0, E))
        if key is value:
            k, v = split(key, 2, *rows(E, 3 * E))
        else:
            (k,), (v,) = split(key, 1, *rows(E, 2 * E)), split(value, 1, *rows(2 * E, 3 * E))

    attn_bias = None
    if attn_mask is not None and not (is_causal and key_padding_mask is None):
        is_causal = False
        # In torch's masks True hides a key, in attn_bias True keeps it.
        attn_bias = ~attn_mask if attn_mask.dtype is torch.bool else attn_mask
        if attn_bias.dim() == 3:
            attn_bias = attn_bias.view(-1, H, *attn_bias.shape[1:])  # [B * H, L, S] -> [B, H, L, S]
    if key_padding_mask is not None and key_padding_mask.dtype is not torch.bool:
        padding = key_padding_mask[:, None, None, :]  # B 1 1 S
        if attn_bias is None:
            attn_bias = padding
        elif attn_bias.dtype is torch.bool:
            attn_bias = padding.masked_fill(~attn_bias, float("-inf"))
        else:
            attn_bias = attn_bias + padding
        key_padding_mask = None
    y = ops.attention(
        q,
        k,
        v,
        causal=is_causal,
        key_padding_mask=key_padding_mask,
        attn_bias=attn_bias,
        dropout_p=mha.dropout if mha.training else 0.0,
        backend=backend,
    )
    y = y.permute((0, 2, 1, 3) if mha.batch_first else (2, 0, 1, 3))  # [B, L, H, D], [L, B, H, D]
    return y.reshape(first, second, E)


def _add_out_proj(mha, heads: Tensor, residual: Tensor, dropout: nn.Module, backend: str):
    """(dropout1(out_proj(heads)), whether the residual was added to it)."""
    out = mha._modules["out_proj"]
    p = dropout_probability(dropout)
    if p is not None and residual.dtype is heads.dtype:
        options = {"residual": residual, "dropout_p": p, "backend": backend}
        return ops.gemm(heads, out.weight, out.bias, **options), True
    return dropout(ops.gemm(heads, out.weight, out.bias, backend=backend)), False


CLASSES = {
    cls.original(): cls
    for cls in (
        FusedLayerNorm,
        FusedLinear,
        FusedMultiheadAttention,
        FusedTransformerEncoderLayer,
    )
}
SUPPORTED = (
    "nn.LayerNorm, nn.Linear, nn.MultiheadAttention, nn.TransformerEncoderLayer in any model"
)
LEFT_ALONE = {
    NonDynamicallyQuantizableLinear: "its weights are read by the MultiheadAttention around it",
    nn.Embedding: "a lookup, no kernel",
    nn.Dropout: "torch's own dropout; it does nothing in evaluation",
}

"""The reference GPT (cgpt_kernels.gpt), with the same fusions as Hugging Face's GPT-2.

B batch, S new tokens, T all tokens, C width, H heads, D = C / H.
"""

from __future__ import annotations

from torch import Tensor

from cgpt_kernels import decoder, ops
from cgpt_kernels.gpt import ACTIVATIONS, GPT, MLP, Block, CausalSelfAttention, drop
from cgpt_kernels.replace.swap import (
    Replaced,
    decoder_kind,
    drops,
    multiply,
    norm,
    norm_sum,
    operands,
    plain,
    product,
    project,
    project_activate,
    projection,
    table,
)
from cgpt_kernels.replace.tied import look_up, readable_head
from cgpt_kernels.replace.torch_nn import FusedLayerNorm, FusedLinear

_ACTIVATION_NAMES = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}


class FusedCausalSelfAttention(CausalSelfAttention, Replaced):
    uses = ("gemm", "attention")

    def forward(self, x: Tensor, mask: Tensor | None, cache) -> Tensor:
        y = _heads(self, x, mask, cache, self.kernel_backend)
        y = project(self._modules["c_proj"], FusedLinear, y, self.kernel_backend)
        return drop(y, self.resid_pdrop, self.training)


class FusedMLP(MLP, Replaced):
    uses = ("gemm",)

    def forward(self, x: Tensor) -> Tensor:
        y = _hidden(self, x, self.kernel_backend)
        y = project(self._modules["c_proj"], FusedLinear, y, self.kernel_backend)
        return drop(y, self.resid_pdrop, self.training)


class FusedBlock(Block, Replaced):
    uses = ("layer_norm", "gemm", "attention")

    def forward(self, x: Tensor, mask: Tensor | None, cache) -> Tensor:
        parts, backend = self._modules, self.kernel_backend
        attn, mlp = parts["attn"], parts["mlp"]

        y = norm(parts["ln_1"], FusedLayerNorm, x, backend)
        if plain(attn, FusedCausalSelfAttention):
            y = _heads(attn, y, mask, cache, backend)
            y, added = _project_add(attn, y, x, backend)
        else:
            y, added = attn(y, mask, cache), False
        y, x = norm_sum(parts["ln_2"], FusedLayerNorm, y, added, x, backend)

        if not plain(mlp, FusedMLP):
            return x + mlp(y)
        y = _hidden(mlp, y, backend)
        y, added = _project_add(mlp, y, x, backend)
        return y if added else x + y


class FusedGPT(GPT, Replaced):
    """The loss is taken without the logits, where the head may be read past its __call__."""

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        targets: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "cache": cache}
        wb = None if targets is None else readable_head(self)
        if wb is None:
            return super().forward(input_ids, targets=targets, last_only=last_only, **given)
        self._check_inputs(input_ids, attention_mask, position_ids, cache, targets)
        weight, bias = wb
        rows, weight = look_up(self.transformer["wte"], input_ids, weight) or (None, weight)
        x = self.hidden_states(input_ids, rows=rows, **given)
        return ops.linear_cross_entropy(x, weight, targets, bias, backend=self.kernel_backend)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        wb = readable_head(self)
        if wb is None:
            return super().loss(x, targets)
        weight, bias = wb
        return ops.linear_cross_entropy(x, weight, targets, bias, backend=self.kernel_backend)


def _project_add(part, x: Tensor, residual: Tensor, backend: str) -> tuple[Tensor, bool]:
    """(dropout(c_proj(x)) of the attention or MLP `part`, whether residual was added to it)."""
    linear, p = part._modules["c_proj"], _dropout(part, part.resid_pdrop)
    by = product(linear, FusedLinear, x.dtype)
    if by is None or residual.dtype is not x.dtype or (p and not drops(by)):
        return drop(linear(x), p, True), False
    return multiply(by, x, backend, residual=residual, dropout_p=p), True


def _dropout(part, p: float) -> float:
    return p if part.training else 0.0


def _heads(attn, x: Tensor, mask: Tensor | None, cache, backend: str) -> Tensor:
    """The heads' outputs side by side, before c_proj. x [B, S, C] -> [B, S, C]."""
    B, S, C = x.shape
    qkv = project(attn._modules["c_attn"], FusedLinear, x, backend)
    H = attn.n_head
    q, k, v = qkv.view(B, S, 3, H, C // H).permute(2, 0, 3, 1, 4)  # B H S D
    if cache is not None:
        k, v = cache.append(attn.layer, k, v)
    # Without a mask the model means causal, and it makes a mask where S of more than one token
    # follow cached ones.
    y = ops.attention(
        q,
        k,
        v,
        causal=mask is None,
        attn_bias=mask,
        scale=attn.scale,
        dropout_p=_dropout(attn, attn.attn_pdrop),
        backend=backend,
    )
    return y.transpose(1, 2).reshape(B, S, C)


def _hidden(mlp, x: Tensor, backend: str) -> Tensor:
    """activation(c_fc(x)), [B, S, C] -> [B, S, n_inner]."""
    name = mlp.activation
    return project_activate(
        mlp._modules["c_fc"], FusedLinear, x, ACTIVATIONS[name], _ACTIVATION_NAMES[name], backend
    )


def decoder_parts(model) -> decoder.Parts | None:
    """What a decoder of this model is made of; None where only the modules can run it."""
    if not plain(model, FusedGPT):
        return None
    top, head, c = model.transformer, model._modules["lm_head"], model.config
    wte, wpe = table(top["wte"]), table(top["wpe"])
    if wte is None or wpe is None or _dropout(model, c.embd_pdrop):
        return None
    kind = decoder_kind(top["h"], wte)
    if kind is None:
        return None
    norm, head = operands(top["ln_f"], FusedLayerNorm), projection(head, FusedLinear, kind)
    layers = [_decoder_layer(block, kind) for block in top["h"]]
    if norm is None or head is None or None in layers:
        return None
    scale = c.mup_embeddings_scale
    if kind == "cpu" and scale != 1.0:
        wte, wpe, scale = wte * scale, wpe * scale, 1.0
    if c.logits_scale != 1.0:  # the head is linear: its input may be scaled instead, in fp32
        norm = tuple(p if p is None else p.float() * c.logits_scale for p in norm)
    activation = _ACTIVATION_NAMES[c.activation_function]
    eps = c.layer_norm_epsilon
    return decoder.Parts(wte, wpe, layers, norm, head, c.n_head, eps, activation, kind, scale)


def _decoder_layer(block, kind: str) -> decoder.Layer | None:
    parts = block._modules
    attn, mlp = parts["attn"], parts["mlp"]
    if not (
        plain(block, FusedBlock)
        and plain(attn, FusedCausalSelfAttention)
        and plain(mlp, FusedMLP)
        and not _dropout(attn, attn.attn_pdrop or attn.resid_pdrop)
        and not _dropout(mlp, mlp.resid_pdrop)
    ):
        return None
    found = (
        operands(parts["ln_1"], FusedLayerNorm),
        projection(attn._modules["c_attn"], FusedLinear, kind),
        projection(attn._modules["c_proj"], FusedLinear, kind),
        operands(parts["ln_2"], FusedLayerNorm),
        projection(mlp._modules["c_fc"], FusedLinear, kind),
        projection(mlp._modules["c_proj"], FusedLinear, kind),
    )
    return None if None in found else decoder.Layer(attn.scale, *found)


CLASSES = {
    cls.original(): cls for cls in (FusedCausalSelfAttention, FusedMLP, FusedBlock, FusedGPT)
}

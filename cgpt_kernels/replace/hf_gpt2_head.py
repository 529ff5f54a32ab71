"""Hugging Face's GPT2LMHeadModel in training: the loss without the logits, which are made when they
are read.

B batch, S tokens, V vocabulary, C width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel, GPT2Model

from cgpt_kernels import ops
from cgpt_kernels.replace.packing import state_of
from cgpt_kernels.replace.swap import Replaced, unhooked
from cgpt_kernels.replace.tied import look_up, readable_head


class FusedGPT2LMHeadModel(GPT2LMHeadModel, Replaced):
    @classmethod
    def note(cls, module):
        return "in training the loss is taken without logits, which are made when they are read"

    @functools.wraps(GPT2LMHeadModel.forward)  # Trainer and generate read the signature
    def forward(self, input_ids=None, *args, labels=None, **kwargs):
        wb = _readable(self, input_ids, args, labels, kwargs)
        if wb is None:
            if labels is not None:
                kwargs["labels"] = labels
            return super().forward(input_ids, *args, **kwargs)
        weight, bias = wb
        kwargs.pop("logits_to_keep", None), kwargs.pop("return_dict", None)
        given = {"input_ids": input_ids}
        model = self._modules["transformer"]
        if kwargs.get("token_type_ids") is None:  # other rows of the embedding
            looked_up = look_up(model._modules["wte"], input_ids, weight)
            if looked_up is not None:
                model.warn_if_padding_and_no_attention_mask(input_ids, kwargs.get("attention_mask"))
                rows, weight = looked_up
                given = {"inputs_embeds": rows}
        found = model(**given, **kwargs)
        hidden = found.last_hidden_state
        loss = _loss(hidden, weight, bias, labels, self.kernel_backend, **kwargs)
        names = {f.name for f in dataclasses.fields(found)} - {"last_hidden_state"}
        more = {
            f.name: getattr(found, f.name)
            for f in dataclasses.fields(CausalLMOutputWithCrossAttentions)
            if f.name in names
        }
        return LossAndLaterLogits(loss=loss, logits=_Later(self.lm_head, hidden), **more)


# Configurations, Trainer and pipelines know a model by its class's name.
FusedGPT2LMHeadModel.__name__ = GPT2LMHeadModel.__name__


def _readable(model, input_ids, args, labels, kwargs) -> tuple[Tensor, Tensor | None] | None:
    """What the loss multiplies by; None where the original forward must run."""
    if (
        labels is None
        or input_ids is None
        or input_ids.dim() != 2
        or args
        or not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not unhooked(model)
        or type(model._modules["transformer"]) is not GPT2Model
        or model.loss_function is not ForCausalLMLoss
        or not (kwargs.get("return_dict") is None or kwargs["return_dict"])
        or not model.config.return_dict
        or type(kwargs.get("logits_to_keep", 0)) is not int
        or kwargs.get("logits_to_keep", 0) != 0
    ):
        return None
    wb = readable_head(model)
    if wb is None or not (wb[0].requires_grad or model.transformer.ln_f.weight.requires_grad):
        return None
    return wb


def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    backend: str,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_,
) -> Tensor:
    """What ForCausalLMLoss gives for the logits of hidden [B, S, C]; labels [B, S]."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = ops.linear_cross_entropy(
        hidden,
        weight,
        shift_labels.reshape(hidden.shape[:-1]).contiguous(),
        bias,
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
        backend=backend,
    )
    if num_items_in_batch is None:
        return loss
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


class _Later:
    """Logits that nobody has read yet."""

    def __init__(self, head: nn.Module, hidden: Tensor):
        self.head, self.hidden, self.state = head, hidden, state_of(head.weight)
        device = hidden.device.type
        self.context = contextlib.nullcontext
        if torch.is_autocast_enabled(device):
            self.context = functools.partial(
                torch.autocast, device, torch.get_autocast_dtype(device)
            )

    def __call__(self) -> Tensor:
        if state_of(self.head.weight) != self.state:
            raise RuntimeError(
                "replaced GPT2LMHeadModel: lm_head.weight has changed since the forward, so its "
                "logits cannot be made any more: read outputs.logits before the optimizer's step, "
                "or call the model without labels"
            )
        with self.context():
            return self.head(self.hidden)


class LossAndLaterLogits(CausalLMOutputWithCrossAttentions):
    """The same keys and attributes; the product behind `logits` is made at the first look at it."""

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if type(value) is _Later:
            value = value()
            self[name] = value
        return value

    def __getitem__(self, key):
        if key == 0 or key == "loss":  # all that Trainer reads
            return self.loss
        self.logits  # noqa: B018
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default

    def items(self):
        self.logits  # noqa: B018
        return super().items()

    def values(self):
        self.logits  # noqa: B018
        return super().values()

    def __reduce__(self):
        self.logits  # noqa: B018
        return super().__reduce__()

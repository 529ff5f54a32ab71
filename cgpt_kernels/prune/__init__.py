"""Structured pruning: an MLP with fewer neurons, a smaller dense model that runs faster as it is.

    small, report = ck.prune.prune_mlp(model, 0.25, calibration_ids)

A neuron's share in the loss is estimated from text: the variance of its activation, times the
squared norm of its row in c_proj. What varies little can be replaced by its mean, and that mean is
added to c_proj's bias. Every layer gives up the same number of neurons, so the result is an
ordinary GPT with another n_inner, which is saved, loaded, replaced, quantized and trained as any
other.

Source: An et al., "Fluctuation-based adaptive structured pruning" (FLAP), arXiv 2312.11983.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..gpt import ACTIVATIONS, GPT

__all__ = ["Report", "prune_mlp"]

STEP = 32  # kept neurons are a multiple: a panel of a packed weight, a step of its K


@dataclass(frozen=True)
class Report:
    """Neurons per layer before and after; parameters before and after, embeddings included."""

    neurons: int
    kept: int
    parameters: int
    kept_parameters: int


@torch.no_grad()
def prune_mlp(model: GPT, share: float, ids: np.ndarray | Tensor) -> tuple[GPT, Report]:
    """A copy of `model` without the least important `share` of each layer's MLP neurons.

    model: a `GPT`, not quantized; it is left as it is.
    share: in (0, 1); the number kept is rounded to a multiple of 32, at least 32.
    ids: token ids [n] of text like the model's own, to measure activations on.

    Raises ValueError where share, ids or the width allow nothing to be removed.
    """
    if not isinstance(model, GPT):
        raise TypeError(f"prune_mlp: model must be a cgpt_kernels.GPT, got {type(model).__name__}")
    if not 0 < share < 1:
        raise ValueError(f"prune_mlp: share must lie between 0 and 1, got {share}")
    if len(ids) < 2:
        raise ValueError(f"prune_mlp: ids must hold at least 2 tokens, got {len(ids)}")
    inner = model.config.n_inner
    kept = max(STEP, round(inner * (1 - share) / STEP) * STEP)
    if kept >= inner:
        raise ValueError(
            f"prune_mlp: share {share} of {inner} neurons, kept in steps of {STEP}, removes none"
        )
    means, variances = _activations(model, ids)

    config = dataclasses.replace(model.config, n_inner=kept)
    small = GPT(config).to(model.lm_head.weight.dtype)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for layer, (block, mean, variance) in enumerate(
        zip(model.transformer.h, means, variances, strict=True)
    ):
        out = block.mlp.c_proj.weight.double()  # C inner
        score = variance * out.square().sum(0)
        order = score.argsort(descending=True, stable=True)
        keep, drop = order[:kept].sort().values, order[kept:]
        name = f"transformer.h.{layer}.mlp."
        state[name + "c_fc.weight"] = block.mlp.c_fc.weight[keep]
        state[name + "c_fc.bias"] = block.mlp.c_fc.bias[keep]
        state[name + "c_proj.weight"] = block.mlp.c_proj.weight[:, keep].contiguous()
        moved = out[:, drop] @ mean[drop]  # what the removed neurons add on average
        bias = block.mlp.c_proj.bias
        state[name + "c_proj.bias"] = (bias.double() + moved).to(bias.dtype)
    small.load_state_dict(state)
    small.train(model.training)

    def parameters(m: GPT) -> int:
        return sum(p.numel() for p in m.parameters())

    return small, Report(inner, kept, parameters(model), parameters(small))


def _activations(model: GPT, ids: np.ndarray | Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and variance of each MLP neuron over the text, fp64 [n_inner] per layer."""
    sums = [torch.zeros(2, model.config.n_inner, dtype=torch.float64) for _ in model.transformer.h]
    activate, count = ACTIVATIONS[model.config.activation_function], 0

    def watch(total: Tensor):
        def hook(module, inputs):
            fc = module.c_fc
            h = activate(F.linear(inputs[0], fc.weight, fc.bias))
            h = h.flatten(0, -2).double()
            total[0] += h.sum(0)
            total[1] += h.square().sum(0)

        return hook

    blocks = zip(model.transformer.h, sums, strict=True)
    handles = [block.mlp.register_forward_pre_hook(watch(total)) for block, total in blocks]
    training, length = model.training, model.config.n_positions
    model.eval()
    try:
        for start in range(0, len(ids), length):
            part = torch.as_tensor(np.asarray(ids[start : start + length], dtype=np.int64))
            model.hidden_states(part[None])
            count += len(part)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    means = [total[0] / count for total in sums]
    return means, [(total[1] / count - m.square()) for total, m in zip(sums, means, strict=True)]

"""The ends of a language model in training: the loss's head, read past its __call__, and the
look-up of an embedding that shares its weight, with one gradient for both.

B batch, S tokens, V vocabulary, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cgpt_kernels import backends
from cgpt_kernels.replace.packing import given_up
from cgpt_kernels.replace.swap import dense, operands, plain
from cgpt_kernels.replace.torch_nn import FusedLinear


def readable_head(model: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) of a replaced model's lm_head where its loss may be taken without logits."""
    head, backend = model._modules["lm_head"], model.kernel_backend
    wb = operands(head, FusedLinear)
    if wb is None or head.quantize is not None or given_up(head) or not _has_loss(backend):
        return None
    return wb


@torch.compiler.assume_constant_result
def _has_loss(backend: str) -> bool:
    op = "linear_cross_entropy"
    return backend in ("auto", "eager") or backends.implementation(op, backend)[0] is not None


def look_up(embedding: nn.Module, ids: Tensor, head: Tensor) -> tuple[Tensor, Tensor] | None:
    """(rows of the embedding [B, S, C], the weight for the head to read), or None where the
    embedding must be called, or shares nothing with `head`, or no gradient is wanted."""
    if (
        not plain(embedding, nn.Embedding)
        or embedding.weight is not head
        or embedding.padding_idx is not None
        or embedding.max_norm is not None
        or embedding.scale_grad_by_freq
        or embedding.sparse
        or not (torch.is_grad_enabled() and head.requires_grad)
        or torch.compiler.is_compiling()
        or dense(embedding) is None
    ):
        return None
    return _LookUp.apply(head, ids)


class _LookUp(torch.autograd.Function):
    """The head's gradient comes first and is dense; the rows that were looked up are added to it
    where it lies. As nodes of their own they would make a second matrix [V, C], which is 0 in all
    but a few rows, and a sum of both: 300 MB read or written for GPT-2's vocabulary at C = 768."""

    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        ctx.set_materialize_grads(False)
        return torch.nn.functional.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, drows, dweight):
        if drows is None:
            return dweight, None
        if dweight is None:
            dweight = drows.new_zeros(ctx.shape, dtype=ctx.dtype)
        (ids,) = ctx.saved_tensors
        seen, place = ids.flatten().unique(return_inverse=True)
        # In fp32, and rounded once, however often a token comes.
        wide = torch.promote_types(ctx.dtype, torch.float32)
        sums = drows.new_zeros(len(seen), ctx.shape[1], dtype=wide)
        sums.index_add_(0, place, drows.reshape(-1, ctx.shape[1]).to(wide))
        sums += dweight[seen]
        dweight[seen] = sums.to(ctx.dtype)
        return dweight, None

"""A small Hugging Face GPT-2, a small reference GPT and their inputs, for the tests that replace
their modules.

B batch, S tokens, V vocabulary.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import cgpt_kernels as ck

V = 97  # odd, as GPT-2's own vocabulary
REFERENCE = ck.GPTConfig(
    vocab_size=V, n_positions=64, n_embd=48, n_layer=3, n_head=3, initializer_range=0.2
)


@torch.no_grad()
def reference(config=REFERENCE, dtype=torch.float32, seed=0):
    """A reference GPT with biases."""
    torch.manual_seed(seed)
    model = ck.GPT(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.normal_(std=0.2)
    return model.to(dtype)


def make(cls=GPT2LMHeadModel, **options):
    """A small model whose outputs differ enough between positions for wrong masks to show."""
    torch.manual_seed(0)
    config = {
        "n_layer": 2,
        "n_embd": 48,
        "n_head": 3,
        "vocab_size": V,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    return cls(GPT2Config(**(config | options))).eval()


def tokens(B=2, S=9):
    return torch.randint(2, V, (B, S), generator=torch.Generator().manual_seed(1))


def left_padded(B=2, S=9, padding=4):
    ids, mask = tokens(B, S), torch.ones(B, S, dtype=torch.long)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return ids, mask


def close(a, b, tol=2e-5):
    """Equal to fp32 rounding: relative to the larger tensor's scale."""
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tol * max(1.0, b.abs().max())


@torch.no_grad()
def logits(model, *args, **kwargs):
    return model(*args, **kwargs).logits

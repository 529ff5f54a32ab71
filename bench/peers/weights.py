"""Random weights of a published shape, as one Hugging Face checkpoint that every system reads.

Greedy tokens must tell whether two systems compute the same function. With GPT-2's initialisation
they do not: the residual stream stays close to the tied token embedding, and any model repeats its
last token. Here the layers outweigh the embedding, attention is sharp enough that what it looks at
matters, positions count more than tokens, and no parameter is zero or one throughout.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import torch

from cgpt_kernels import GPT, GPTConfig

# A prompt of 2048 tokens can be continued; of the position embedding only rows in use are read.
SPARE_POSITIONS = 64


def config_of(name: str) -> GPTConfig:
    """The published shape with room for a few tokens after its longest prompt."""
    config = GPTConfig.from_name(name)
    return dataclasses.replace(config, n_positions=config.n_positions + SPARE_POSITIONS)


# Standard deviations: embeddings as such, matrices times 1 / sqrt(fan_in). Found by trying: with 1
# everywhere greedy text settles on one token within a few steps, with these it does not in 12
# steps of the 111M shape, while bf16 still agrees with fp32 in most of them.
_STD = {"wte": 0.02, "wpe": 0.06, "c_attn": 2.0, "c_proj": 0.3}


@torch.no_grad()
def random_gpt(config: GPTConfig, seed: int = 0) -> GPT:
    """Random weights, the same for a config and seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(config)
        for name, p in model.named_parameters():
            part, kind = name.split(".")[-2:]
            if p.dim() == 2:
                fan_in = 1 if part in ("wte", "wpe") else p.shape[1]
                p.normal_(std=_STD.get(part, 1.0) * fan_in**-0.5)
            else:
                p.normal_(mean=0.0 if kind == "bias" else 1.0, std=0.1)
    return model.eval()


def checkpoint(config: GPTConfig, folder: Path) -> Path:
    """The folder, with the checkpoint written into it where it is not there yet."""
    if not (folder / "config.json").is_file():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        random_gpt(config).save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder


def prompts(config: GPTConfig, batch: int, length: int) -> list[list[int]]:
    """Random token ids; a smaller batch or length is the beginning of a larger one."""
    rows = torch.randint(config.vocab_size, (64, 4096), generator=torch.Generator().manual_seed(0))
    return rows[:batch, :length].tolist()

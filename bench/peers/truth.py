"""The checkpoint and what eager fp32 continues it with: the yardstick of every system's tokens.

    python -m peers.truth CONFIG FOLDER THREADS '[[batch, prompt, new_tokens], ...]'

CONFIG: GPTConfig's fields as JSON. Written into FOLDER once: checkpoint/, and per work a file of
tokens and logits.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from cgpt_kernels import GPT, GPTConfig

from . import weights


def file_of(folder: Path, batch: int, prompt: int, new_tokens: int) -> Path:
    return folder / f"truth-{batch}x{prompt}+{new_tokens}.pt"


@torch.no_grad()
def continued(model, prompts: list[list[int]], new_tokens: int) -> dict[str, torch.Tensor]:
    """tokens int64 [B, N] and the fp32 logits [B, N, V] that chose them, by plain PyTorch."""
    feed = torch.tensor(prompts)
    cache = model.new_cache(len(prompts), feed.shape[1] + new_tokens)
    tokens, logits = [], []
    for _ in range(new_tokens):
        logits.append(model(feed, cache=cache, last_only=True)[:, -1])  # B V
        feed = logits[-1].argmax(-1, keepdim=True)
        tokens.append(feed)
    return {"tokens": torch.cat(tokens, 1), "logits": torch.stack(logits, 1)}


def agreement(truth: dict[str, torch.Tensor], tokens: list[list[int]]) -> tuple[int, float]:
    """How far `tokens` [B][N] follow the truth.

    Returns the leading tokens that are equal in all rows, and the largest gap where a row parts:
    by how much the truth's logits prefer their own token, in standard deviations of those logits.
    0 where nothing parts; two unrelated models are about 4 apart.
    """
    same, worst = len(tokens[0]), 0.0
    for row, given in enumerate(tokens):
        expected = truth["tokens"][row, : len(given)]
        unequal = (expected != torch.tensor(given)).nonzero()
        if len(unequal):
            at = int(unequal[0])
            logits = truth["logits"][row, at]
            gap = (logits.max() - logits[given[at]]) / logits.std()
            same, worst = min(same, at), max(worst, gap.item())
    return same, worst


def main() -> None:
    folder = Path(sys.argv[2])
    config, threads, works = (json.loads(sys.argv[i]) for i in (1, 3, 4))
    torch.set_num_threads(threads)
    weights.checkpoint(GPTConfig(**config), folder / "checkpoint")
    missing = [work for work in works if not file_of(folder, *work).is_file()]
    if missing:
        model = GPT.from_pretrained(folder / "checkpoint").eval()
        for batch, prompt, new_tokens in missing:
            prompts = weights.prompts(model.config, batch, prompt)
            file = file_of(folder, batch, prompt, new_tokens)
            partial = file.with_name(f"{file.name}.{os.getpid()}")
            torch.save(continued(model, prompts, new_tokens), partial)
            partial.rename(file)


if __name__ == "__main__":
    main()

"""Text classification with GPT2ForSequenceClassification, replaced: code, docstring or comment?

    python examples/classify_gpt2.py

The body is the shipped checkpoint, pretrained on Python's library; the head is new. Paragraphs come
from that library, quotes and # removed, and are held out by file: the body may have seen a held-out
file's text, the head has not.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from shared import KINDS, accuracy, console, labelled, random_rows, train
from transformers import GPT2ForSequenceClassification

import cgpt_kernels as ck
from cgpt_kernels.assets import TINY


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 120,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    batch: Annotated[int, typer.Option(help="Paragraphs per step.", min=1)] = 16,
    length: Annotated[int, typer.Option(help="Tokens per paragraph.", min=8, max=512)] = 48,
    modules: Annotated[int, typer.Option(help="Modules that paragraphs come from.", min=8)] = 60,
    eager: Annotated[bool, typer.Option(help="Train without replacing modules.")] = False,
) -> dict[str, float]:
    """Fine-tune the shipped model as a classifier; print the accuracy before and after."""
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification.from_pretrained(
        TINY, num_labels=len(KINDS), pad_token_id=0, dtype=torch.float32
    )
    if not eager:
        ck.replace(model)
    data = labelled(modules, length)
    sizes = ", ".join(f"{len(rows[2]):,} {split}" for split, rows in data.items())
    console.print(f"paragraphs: {sizes}; a third of each kind")
    before = accuracy(model, data["held out"])
    rows = random_rows(data["train"], batch, seed=0)
    seconds = train("GPT-2 classifier", model, lambda: model(**next(rows)).loss, steps, lr)
    after = accuracy(model, data["held out"])
    majority = 1 / len(KINDS)
    console.print(
        f"held-out accuracy: majority {majority:.1%}, before {before:.1%}, after {after:.1%}"
    )
    console.print(f"{seconds:.1f} s, {steps * batch / seconds:,.0f} paragraphs/s")
    return {"majority": majority, "before": before, "after": after, "seconds": seconds}


if __name__ == "__main__":
    typer.run(main)

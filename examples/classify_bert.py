"""Text classification with a small BERT, replaced: code, docstring or comment?

    python examples/classify_bert.py

No pretrained BERT is shipped: this one starts from random weights and learns the task alone, so it
says what a small bidirectional encoder reaches in a minute, not what pretraining brings. The tokens
are the shipped checkpoint's.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from shared import KINDS, accuracy, console, labelled, random_rows, train
from transformers import BertConfig, BertForSequenceClassification

import cgpt_kernels as ck


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 250,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    batch: Annotated[int, typer.Option(help="Paragraphs per step.", min=1)] = 32,
    length: Annotated[int, typer.Option(help="Tokens per paragraph.", min=8, max=512)] = 48,
    modules: Annotated[int, typer.Option(help="Modules that paragraphs come from.", min=8)] = 60,
    width: Annotated[int, typer.Option(help="Hidden size, a multiple of 64.", min=64)] = 128,
    layers: Annotated[int, typer.Option(help="Layers.", min=1)] = 2,
    eager: Annotated[bool, typer.Option(help="Train without replacing modules.")] = False,
) -> dict[str, float]:
    """Train a small BERT from random weights; print the accuracy before and after."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4097,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        num_labels=len(KINDS),
    )
    model = BertForSequenceClassification(config)
    if not eager:
        ck.replace(model)
    data = labelled(modules, length)
    sizes = ", ".join(f"{len(rows[2]):,} {split}" for split, rows in data.items())
    console.print(f"paragraphs: {sizes}; a third of each kind")
    before = accuracy(model, data["held out"])
    rows = random_rows(data["train"], batch, seed=0)
    seconds = train("BERT classifier", model, lambda: model(**next(rows)).loss, steps, lr)
    after = accuracy(model, data["held out"])
    majority = 1 / len(KINDS)
    console.print(
        f"held-out accuracy: majority {majority:.1%}, before {before:.1%}, after {after:.1%}"
    )
    console.print(f"{seconds:.1f} s, {steps * batch / seconds:,.0f} paragraphs/s")
    return {"majority": majority, "before": before, "after": after, "seconds": seconds}


if __name__ == "__main__":
    typer.run(main)

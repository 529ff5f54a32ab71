"""LoRA fine-tuning of a replaced model: a GPT of Python sources learns to write bytecode listings.

    python examples/lora.py

peft's adapters on Hugging Face GPT-2 classes; `ck.replace` fuses each adapted projection into one
gemm, forward and in the gradient of its input. --eager trains without it, to compare the time.
"""

from __future__ import annotations

from typing import Annotated

import peft
import torch
import typer
from shared import (
    LANGUAGES,
    console,
    language_loss,
    random_windows,
    token_streams,
    train,
    trainable,
    windows,
)
from transformers import AutoModelForCausalLM

import cgpt_kernels as ck
from cgpt_kernels.assets import TINY


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 120,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.", min=1)] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    batch: Annotated[int, typer.Option(help="Windows per step.", min=1)] = 4,
    length: Annotated[int, typer.Option(help="Tokens per window.", min=8, max=512)] = 128,
    language: Annotated[str, typer.Option(help=f"One of {', '.join(LANGUAGES)}.")] = "bytecode",
    modules: Annotated[int, typer.Option(help="Modules that the text comes from.", min=8)] = 24,
    eager: Annotated[bool, typer.Option(help="Train without replacing modules.")] = False,
) -> dict[str, float]:
    """Fine-tune the shipped model by LoRA; print the held-out loss before and after."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config)
    if not eager:
        ck.replace(model)
    learn, keep = token_streams(language, modules)
    held_out = windows(keep, length, 64)

    console.print(f"{language}: {len(learn):,} training tokens, LoRA trains {trainable(model)}")
    before = language_loss(model, held_out)
    rows = random_windows(learn, batch, length, seed=0)

    def loss_of() -> torch.Tensor:
        ids = next(rows)
        return model(input_ids=ids, labels=ids).loss

    seconds = train("LoRA", model, loss_of, steps, lr)
    after = language_loss(model, held_out)
    with model.disable_adapter():
        without = language_loss(model, held_out)
    console.print(f"held-out loss, nats per token: {before:.3f} before, {after:.3f} after")
    console.print(f"with the adapter switched off: {without:.3f}")
    console.print(f"{seconds:.1f} s, {steps * batch * length / seconds:,.0f} tokens/s")
    return {"before": before, "after": after, "without": without, "seconds": seconds}


if __name__ == "__main__":
    typer.run(main)

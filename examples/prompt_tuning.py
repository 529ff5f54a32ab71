"""Prompt and prefix tuning of a replaced model: a few virtual tokens teach it a new language.

    python examples/prompt_tuning.py                    # prefix tuning: keys and values per layer
    python examples/prompt_tuning.py --method prompt    # prompt tuning: embeddings only

The model itself stays as it is; peft puts virtual tokens before the text, as cached keys and values
(prefix) or as embeddings (prompt), and only they train.
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

METHODS = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}


def main(
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "prefix",
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 120,
    virtual_tokens: Annotated[int, typer.Option(help="Virtual tokens.", min=1, max=256)] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-2,
    batch: Annotated[int, typer.Option(help="Windows per step.", min=1)] = 4,
    length: Annotated[int, typer.Option(help="Tokens per window.", min=8, max=256)] = 128,
    language: Annotated[str, typer.Option(help=f"One of {', '.join(LANGUAGES)}.")] = "bytecode",
    modules: Annotated[int, typer.Option(help="Modules that the text comes from.", min=8)] = 24,
    eager: Annotated[bool, typer.Option(help="Train without replacing modules.")] = False,
) -> dict[str, float]:
    """Tune virtual tokens on the shipped model; print the held-out loss before and after."""
    if method not in METHODS:
        raise typer.BadParameter(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    learn, keep = token_streams(language, modules)
    held_out = windows(keep, length, 64)
    before = language_loss(model, held_out)  # without virtual tokens
    config = METHODS[method](task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens)
    model = peft.get_peft_model(model, config)
    if not eager:
        ck.replace(model)

    console.print(f"{language}: {len(learn):,} training tokens, {method} trains {trainable(model)}")
    rows = random_windows(learn, batch, length, seed=0)

    def loss_of() -> torch.Tensor:
        ids = next(rows)
        return model(input_ids=ids, labels=ids).loss

    seconds = train(f"{method} tuning", model, loss_of, steps, lr)
    after = language_loss(model, held_out)
    console.print(f"held-out loss, nats per token: {before:.3f} before, {after:.3f} after")
    console.print(f"{seconds:.1f} s, {steps * batch * length / seconds:,.0f} tokens/s")
    return {"before": before, "after": after, "seconds": seconds}


if __name__ == "__main__":
    typer.run(main)

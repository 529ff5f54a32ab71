"""Learning one task after another without forgetting: an adapter per task, switched, not reloaded.

    python examples/continual.py

The shipped model learns bytecode listings, then syntax trees. Full fine-tuning moves the weights
that the first task needs. A LoRA adapter per task leaves them alone: `model.set_adapter` gives the
first task's loss back to the last bit, on a replaced model as on any other.
"""

from __future__ import annotations

from typing import Annotated

import peft
import torch
import typer
from rich.table import Table
from shared import console, language_loss, random_windows, token_streams, train, windows
from transformers import AutoModelForCausalLM

import cgpt_kernels as ck
from cgpt_kernels.assets import TINY

TASKS = ("bytecode", "syntax tree")


def load() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps per task.", min=1)] = 60,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.", min=1)] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the adapters.")] = 3e-3,
    full_lr: Annotated[float, typer.Option(help="Peak learning rate of all weights.")] = 5e-4,
    batch: Annotated[int, typer.Option(help="Windows per step.", min=1)] = 4,
    length: Annotated[int, typer.Option(help="Tokens per window.", min=8, max=512)] = 128,
    modules: Annotated[int, typer.Option(help="Modules that the text comes from.", min=8)] = 24,
) -> dict[str, float]:
    """Train two tasks in turn, by adapters and by full fine-tuning; print what each forgets."""
    streams = {task: token_streams(task, modules) for task in TASKS}
    held_out = {task: windows(keep, length, 32) for task, (_, keep) in streams.items()}
    first, second = TASKS

    def learn(model: torch.nn.Module, task: str, what: str, peak: float) -> None:
        rows = random_windows(streams[task][0], batch, length, seed=0)

        def loss_of() -> torch.Tensor:
            ids = next(rows)
            return model(input_ids=ids, labels=ids).loss

        train(f"{what}, {task}", model, loss_of, steps, peak)

    found = {}
    model = load()
    ck.replace(model)
    found["untrained"] = language_loss(model, held_out[first])
    learn(model, first, "all weights", full_lr)
    found["full, after first"] = language_loss(model, held_out[first])
    learn(model, second, "all weights", full_lr)
    found["full, after second"] = language_loss(model, held_out[first])
    found["full, second task"] = language_loss(model, held_out[second])

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(load(), config, adapter_name="first")
    model.add_adapter("second", config)
    ck.replace(model)
    learn(model, first, "adapter", lr)
    found["adapters, after first"] = language_loss(model, held_out[first])
    model.set_adapter("second")
    learn(model, second, "adapter", lr)
    found["adapters, second task"] = language_loss(model, held_out[second])
    model.set_adapter("first")
    found["adapters, after second"] = language_loss(model, held_out[first])

    table = Table("held-out loss, nats per token", "all weights", "an adapter per task")
    table.add_row(f"{first}, untrained", *(f"{found['untrained']:.3f}",) * 2)
    for row, key in (
        (f"{first}, after it was learnt", "after first"),
        (f"{first}, after {second}s were learnt", "after second"),
        (f"{second}s, at the end", "second task"),
    ):
        table.add_row(row, f"{found['full, ' + key]:.3f}", f"{found['adapters, ' + key]:.3f}")
    console.print(table)
    same = found["adapters, after first"] == found["adapters, after second"]
    console.print(f"the first adapter's loss came back {'exactly' if same else 'changed'}")
    return found


if __name__ == "__main__":
    typer.run(main)

"""`cgpt-kernels train` and `cgpt-kernels mup-check`."""

from __future__ import annotations

import dataclasses
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


class Dtype(str, Enum):
    fp32, bf16 = "fp32", "bf16"


class Schedule(str, Enum):
    linear, cosine = "linear", "cosine"


def _option(help: str, *names: str, **more):
    return typer.Option(*names, help=help, **more)


@app.command("train", short_help="Train a GPT on text; kill and resume it at will.")
def train_command(
    context: typer.Context,
    data: Annotated[
        list[str] | None,
        typer.Argument(help="Text files, folders, or patterns in quotes: 'src/**/*.py'."),
    ] = None,
    out: Annotated[Path, _option("Folder of the run; new, or the run's with --resume.")] = ...,
    resume: Annotated[
        bool, _option("Go on from the last checkpoint; the settings are the run's.", "--resume")
    ] = False,
    model: Annotated[
        str | None, _option("Preset for random weights, or a checkpoint's folder to go on from.")
    ] = None,
    width: Annotated[int | None, _option("New model: n_embd, default 256.", min=1)] = None,
    layers: Annotated[int | None, _option("New model: default 4.", min=1)] = None,
    heads: Annotated[int | None, _option("New model: default width / 64.", min=1)] = None,
    mup: Annotated[bool | None, _option("New model: muP, with Cerebras-GPT's base values.")] = None,
    context_: Annotated[
        int | None, _option("Tokens per window; default the model's, or 256.", "--context", min=1)
    ] = None,
    tokenizer: Annotated[
        str | None, _option("tokenizer.json or its folder; default the model's, or made from DATA.")
    ] = None,
    vocab_size: Annotated[int | None, _option("Of a tokenizer that is made.", min=1)] = None,
    steps: Annotated[int | None, _option("Default: by --tokens.", min=1)] = None,
    tokens: Annotated[int | None, _option("Default: 20 per parameter.", min=1)] = None,
    batch: Annotated[int, _option("Windows per pass.", min=1)] = 8,
    accumulate: Annotated[int, _option("Passes per step.", min=1)] = 1,
    lr: Annotated[float | None, _option("Peak; default by the model's size, muP 6e-3.")] = None,
    schedule: Annotated[Schedule, _option("Of the decay.")] = Schedule.linear,
    warmup: Annotated[
        int | None, _option("Steps; default 375 M tokens, at most a sixth.", min=0)
    ] = None,
    final_lr: Annotated[float, _option("Share of the peak at the end.")] = 0.1,
    beta2: Annotated[float, _option("AdamW's; beta1 is 0.9.")] = 0.95,
    weight_decay: Annotated[float, _option("Of matrices.")] = 0.1,
    clip: Annotated[float, _option("Largest norm of the gradient.")] = 1.0,
    dropout: Annotated[float, _option("Of embeddings, attention and residual branches.")] = 0.0,
    dtype: Annotated[Dtype, _option("bf16 keeps fp32 weights and moments.")] = Dtype.fp32,
    backend: Annotated[
        str, _option("auto, or cpu; eager trains the model without this project's ops.")
    ] = "auto",
    threads: Annotated[
        int | None, _option("CPU threads; another number costs the last bits.", min=1)
    ] = None,
    seed: Annotated[int, _option("Of weights, order and dropout.", min=0)] = 0,
    held_out: Annotated[
        list[str] | None, _option("Held-out files, folders or patterns; repeat for several.")
    ] = None,
    held_out_share: Annotated[float, _option("Of the documents, without --held-out.")] = 0.01,
    held_out_tokens: Annotated[int, _option("To measure on, at most.", min=1)] = 100_000,
    held_out_every: Annotated[int | None, _option("Steps; default as --save-every.", min=1)] = None,
    save_every: Annotated[int | None, _option("Steps; default a twentieth.", min=1)] = None,
    keep: Annotated[int, _option("Last checkpoints to keep, and the best.", min=1)] = 2,
    log_every: Annotated[int, _option("Steps.", min=1)] = 10,
    replay: Annotated[
        list[str] | None, _option("Earlier text to mix in, against forgetting; repeatable.")
    ] = None,
    replay_share: Annotated[
        float | None, _option("Of the windows, with --replay; default 0.1.")
    ] = None,
    tensorboard: Annotated[bool, _option("Scalars to OUT/tensorboard.", "--tensorboard")] = False,
) -> None:
    """Train the reference GPT on text, from scratch or from a checkpoint.

    \b
    cgpt-kernels train book.txt --out run                    a small model, 20 tokens per parameter
    cgpt-kernels train texts/ --out run --resume             begins, or goes on after a kill
    cgpt-kernels train --out run --resume                    goes on with what the run was told
    cgpt-kernels train --out run --resume --steps 9000       and makes it longer
    cgpt-kernels train 'src/**/*.py' --out run --width 192 --layers 6 --context 512 \\
        --vocab-size 4097 --mup --steps 3000 --dtype bf16
    cgpt-kernels train texts/ --out run --model cerebras-gpt-111m --batch 4 --accumulate 30
    cgpt-kernels train new/ --out tuned --model run/best --replay texts/ --replay-share 0.2
    cgpt-kernels generate --model run/best --prompt 'Once'

    What is not told is Cerebras-GPT's recipe: AdamW (.9, .95), weight decay .1, gradients clipped
    to norm 1, linear warm-up and linear decay to a tenth. With --mup, widths share one learning
    rate (6e-3): tune it on a narrow model. Ctrl-C saves; a kill loses what came after the last
    checkpoint, and --resume then gives the weights that a run left alone gives, bit for bit.
    OUT/best and OUT/last are checkpoints in Hugging Face format.
    """
    from . import Settings, loop

    given = {
        "context" if name == "context_" else name
        for name in context.params
        if context.get_parameter_source(name).name != "DEFAULT"
    }
    told = {
        "data": tuple(data or ()),
        "out": str(out),
        "model": model,
        "width": width,
        "layers": layers,
        "heads": heads,
        "mup": mup,
        "context": context_,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "steps": steps,
        "tokens": tokens,
        "batch": batch,
        "accumulate": accumulate,
        "lr": lr,
        "schedule": schedule.value,
        "warmup": warmup,
        "final_lr": final_lr,
        "beta2": beta2,
        "weight_decay": weight_decay,
        "clip": clip,
        "dropout": dropout,
        "dtype": dtype.value,
        "backend": backend,
        "threads": threads,
        "seed": seed,
        "held_out": tuple(held_out or ()),
        "held_out_share": held_out_share,
        "held_out_tokens": held_out_tokens,
        "held_out_every": held_out_every,
        "save_every": save_every,
        "keep": keep,
        "log_every": log_every,
        "replay": tuple(replay or ()),
        "replay_share": replay_share if replay_share is not None or not replay else 0.1,
        "tensorboard": tensorboard,
    }
    if "steps" in given or "tokens" in given:  # the one that is given replaces the other
        given |= {"steps", "tokens"}
    before = loop.stored(out) if resume else None
    if before is not None:  # what was not given again is as it was
        settings = dataclasses.replace(before, **{n: told[n] for n in told if n in given})
    else:
        if not data:
            none = f"{out} holds no run to go on with; " if resume else ""
            raise ValueError(f"train: {none}name text to train on: files, folders or patterns")
        settings = Settings(**told)
    result = loop.run(settings, resume=resume, console=_console())
    measured = "" if result.held_out_loss is None else f", held-out loss {result.held_out_loss:.4f}"
    if not result.finished:
        typer.echo(
            f"stopped after step {result.step} of {result.steps}: {result.folder}; go on with "
            f"cgpt-kernels train --out {out} --resume",
            err=True,
        )
        raise typer.Exit(130)
    typer.echo(f"{result.folder}{measured}")


@app.command("mup-check", short_help="Does muP hold here? A width sweep and a coordinate check.")
def mup_check_command(
    out: Annotated[Path, _option("Written as OUT.json and OUT.png.")] = Path("mup-check"),
    widths: Annotated[str, _option("Multiples of 4.")] = "32,64,128,256",
    steps: Annotated[int, _option("Of each run of the sweep.", min=10)] = 120,
    threads: Annotated[int | None, _option("CPU threads.", min=1)] = None,
) -> None:
    """Whether the best learning rate stays put when models get wider: with muP, and without.

    \b
    cgpt-kernels mup-check --out mup         minutes: 4 widths, 8 learning rates, both ways
    cgpt-kernels mup-check --widths 32,64 --steps 60

    Two-layer models on text of a Markov chain. The coordinate check beside it shows the sizes of
    the layers' outputs after a few steps: independent of the width under muP, growing without.
    """
    from .. import timing
    from . import mup_check

    try:
        sizes = [int(width) for width in widths.split(",")]
    except ValueError:
        raise ValueError(f"mup-check: --widths must be like 32,64,128, got {widths!r}") from None
    if len(set(sizes)) < 2 or any(size < 4 or size % 4 for size in sizes):
        raise ValueError(f"mup-check: --widths must be two or more multiples of 4, got {widths!r}")
    mup_check.check_matplotlib()
    console = _console()
    with timing.threads(threads):
        found = mup_check.sweep(sorted(set(sizes)), steps=steps, told=console.print)
        found["coordinates"] = mup_check.coordinate_check(sorted(set(sizes)))
    mup_check.write(found, out)
    typer.echo(f"{out.with_suffix('.json')}, {out.with_suffix('.png')}")


def _console():
    """Rich on stderr; plain text of a fixed width into files and pipes."""
    from rich.console import Console

    wide = None if sys.stderr.isatty() or "COLUMNS" in os.environ else 110
    return Console(stderr=True, width=wide, highlight=False)

"""Checkpoints of a run: whole folders, of which the last few and the best are kept.

Each is a Hugging Face folder (fp32 weights, tokenizer) with two files more: moments.safetensors,
AdamW's, and trainer.json, the step and the losses. The optimizer's step count is the run's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..gpt import GPT
from . import files

_PREFIX = "step-"


def folders(out: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(p for p in out.glob(f"{_PREFIX}*") if (p / "trainer.json").is_file())


def facts(folder: Path) -> dict:
    """What trainer.json says: "step", and "held_out_loss" where it was measured."""
    return json.loads((folder / "trainer.json").read_text(encoding="utf-8"))


def best(out: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss; None where none was measured."""
    measured = [(facts(f)["held_out_loss"], f) for f in folders(out)]
    return min(((loss, f) for loss, f in measured if loss is not None), default=(None, None))[1]


def save(
    out: Path,
    step: int,
    weights: GPT,
    optimizer: torch.optim.AdamW,
    tokens: Path,
    held_out_loss: float | None,
    keep: int,
) -> Path:
    """Write the checkpoint of `step`, then drop what is neither among the last `keep` nor best.

    Raises OSError, with what was there before untouched, where the disk does not take it.
    """
    folder = out / f"{_PREFIX}{step:08}"
    try:
        with files.folder(folder) as unfinished:
            weights.save_pretrained(unfinished)
            save_file(_moments(weights, optimizer), unfinished / "moments.safetensors")
            for file in ("tokenizer.json", "vocab.json", "merges.txt"):
                if (tokens / file).is_file():
                    shutil.copyfile(tokens / file, unfinished / file)
            text = json.dumps({"step": step, "held_out_loss": held_out_loss}) + "\n"
            (unfinished / "trainer.json").write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        before = folders(out)
        kept = f"the last whole checkpoint is {before[-1]}" if before else "there is none before it"
        raise OSError(
            f"train: the checkpoint of step {step} could not be written ({error}); {kept}. Make "
            "room and go on with --resume"
        ) from error
    tidy(out, keep)
    return folder


def tidy(out: Path, keep: int) -> None:
    """Point `last` and `best` at their checkpoints, and delete those that need not be kept."""
    there, chosen = folders(out), best(out)
    if not there:
        return
    files.link(out / "last", there[-1].name)
    if chosen is not None:
        files.link(out / "best", chosen.name)
    for folder in there[:-keep]:
        if folder != chosen:
            files.delete(folder)


def load_moments(folder: Path, weights: GPT, optimizer: torch.optim.AdamW) -> int:
    """Give the optimizer of `weights` its moments in a checkpoint; returns the step."""
    moments = load_file(folder / "moments.safetensors")
    step = facts(folder)["step"]
    for name, p in weights.named_parameters():
        optimizer.state[p] = {
            "step": torch.tensor(float(step)),
            "exp_avg": moments[f"{name}.exp_avg"],
            "exp_avg_sq": moments[f"{name}.exp_avg_sq"],
        }
    return step


def _moments(weights: GPT, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{moment}": optimizer.state[p][moment]
        for name, p in weights.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }

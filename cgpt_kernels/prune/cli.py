"""`cgpt-kernels prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command("prune", short_help="Remove MLP neurons; what it costs in loss.")
def prune_command(
    out: Annotated[Path, typer.Option(help="Folder to write, in Hugging Face format.")],
    model: Annotated[
        str, typer.Option(help="Folder in Hugging Face format, or tiny, the shipped model.")
    ] = "tiny",
    share: Annotated[float, typer.Option(help="Share of the MLP neurons to remove.")] = 0.25,
    tokens: Annotated[
        int, typer.Option(help="Training tokens that importance is measured on.", min=2)
    ] = 30_000,
) -> None:
    """Remove the least important MLP neurons of a GPT-2 checkpoint; the result is a smaller GPT-2.

    Importance is measured on the standard library's training files, the loss on its held-out ones:
    the text that tiny was and was not trained on.

    \b
    cgpt-kernels prune --out tiny-pruned --share 0.25
    cgpt-kernels generate --model tiny-pruned --prompt 'import '
    """
    from rich.console import Console

    from .. import checkpoint, quantize
    from ..assets import TINY
    from ..assets.train_tiny import documents
    from ..gpt import GPT
    from ..train import loss_of
    from ..train.data import read_tokenizer
    from . import prune_mlp

    folder = TINY if model == "tiny" else Path(model)
    checkpoint.check_folder("prune", out, folder)
    checkpoint.check_not_quantized("prune", folder)
    tokenizer = read_tokenizer(folder, "prune")
    loaded = GPT.from_pretrained(folder)
    console = Console()
    with console.status("measuring neurons"):
        texts, left = [], 4 * tokens  # about 4 characters a token
        for _, text in documents()[0][::7]:  # from all over the library
            if left <= 0:
                break
            texts.append(text[: min(left, 4000)])
            left -= len(texts[-1])
        calibration = quantize.encode(folder, tokenizer, texts)[:tokens]
        small, report = prune_mlp(loaded, share, calibration)
    with console.status("loss before and after"):
        ids = quantize.encode(folder, tokenizer, quantize.held_out_text())
        before, after = loss_of(loaded, ids), loss_of(small, ids)
    small.save_pretrained(out)
    checkpoint.copy_tokenizer(folder, out)
    console.print(
        f"{report.neurons} -> {report.kept} neurons per layer, {report.parameters:,} -> "
        f"{report.kept_parameters:,} parameters; loss {before:.4f} -> {after:.4f} nats/token over "
        f"{len(ids) - 1} tokens"
    )
    console.print(f"written to {out}", markup=False, highlight=False)

"""The shipped checkpoint: the text it learns from, and the command that trains it further.

    python -m cgpt_kernels.assets.train_tiny --steps 3800 --resume

The text is what every Python installation carries: the standard library's sources and the language
reference that pydoc shows. Names decide what is held out, so one Python version gives the same data
everywhere. What this does is `cgpt-kernels train` on that text, from the shipped weights, and their
export in bf16 with the losses measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import pydoc_data.topics
import shutil
import sysconfig
from pathlib import Path

import torch
from rich.console import Console

from .. import quantize
from ..gpt import GPT, GPTConfig
from ..train import Settings, data, loss_of, run
from . import TINY

CONTEXT = 512
CONFIG = GPTConfig(
    vocab_size=4097,  # odd on purpose: the published models' vocabulary is odd as well
    n_positions=CONTEXT,
    n_embd=192,
    n_layer=6,
    n_head=3,
    bos_token_id=0,
    eos_token_id=0,
)
HELD_OUT = 4 / 256
SAMPLE_FILES = 3  # held-out files whose own loss is recorded, for the tests


def documents() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(name, text) of training and of held-out documents, sorted by name, split by name's hash."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [(f"topic:{k}", text) for k, text in pydoc_data.topics.topics.items()]
    for file in root.rglob("*.py"):
        name = file.relative_to(root).as_posix()
        # encodings/ is tables of code points; pydoc_data/ holds the topics, taken above as prose.
        if name.startswith(("site-packages/", "encodings/", "pydoc_data/")):
            continue
        try:
            found.append((name, file.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue  # the tests of source encodings are not UTF-8 by design
    found = [(name, text) for name, text in sorted(found) if text]
    _, held_out = data.split([data.Document(name, root / name) for name, _ in found], HELD_OUT)
    names = {document.name for document in held_out}
    return (
        [(name, text) for name, text in found if name not in names],
        [(name, text) for name, text in found if name in names],
    )


def settings(work: Path, steps: int) -> Settings:
    """Small steps: with few tokens to see, many of them learn most. One thread, so that another
    machine with the same processor gives the same weights."""
    return Settings(
        data=(work / "text",),
        out=str(work / "run"),
        model=str(work / "before"),
        context=CONTEXT,
        batch=1,
        steps=steps,
        warmup=200,
        lr=1e-3,
        final_lr=0.0,
        beta2=0.98,
        dtype="bf16",
        threads=1,
        seed=1,
        held_out_share=HELD_OUT,
        held_out_tokens=20480,
        held_out_every=1000,
        save_every=500,
        log_every=50,
    )


def export(trained: Path, before: Path, tokens: data.Tokens, told: Settings, out: Path) -> dict:
    """Write the shipped folder, weights in bf16, and measure what was written."""
    model = GPT.from_pretrained(trained, dtype=torch.bfloat16)
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if out != before:
            shutil.copyfile(before / name, out / name)
    stored = GPT.from_pretrained(out, dtype=torch.float32)
    tokenizer = data.read_tokenizer(out)
    _, held_out = documents()
    stream = tokens.stream("held_out")
    loss = loss_of(stored, stream)
    size = sum(len(text.encode()) for _, text in held_out)
    by_size = sorted(held_out, key=lambda d: (abs(len(d[1]) - 8000), d[0]))
    earlier = json.loads((before / "training.json").read_text(encoding="utf-8"))
    runs = earlier["runs"] + [
        {
            "steps": told.steps,
            "tokens_per_step": told.windows * CONTEXT,
            "peak_learning_rate": told.lr,
            "command": f"python -m cgpt_kernels.assets.train_tiny --steps {told.steps}",
            "held_out_loss": round(loss, 4),
        }
    ]
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_documents": tokens.about["train_documents"],
        "train_tokens": tokens.about["train_tokens"],
        "runs": runs,
        "held_out_documents": len(held_out),
        "held_out_tokens": len(stream),
        "held_out_loss": round(loss, 4),
        "held_out_bits_per_byte": round(loss / math.log(2) * len(stream) / size, 4),
        "held_out_sample": [
            {
                "file": name,
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
                "loss": round(loss_of(stored, quantize.encode(out, tokenizer, [text])), 4),
            }
            for name, text in by_size[:SAMPLE_FILES]
        ],
    }
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(readme(facts), encoding="utf-8")
    return facts


def readme(facts: dict) -> str:
    """The model card; every number in it comes from the runs."""
    runs = "\n".join(
        f"| {r['steps']} | {r['tokens_per_step']} | {r['peak_learning_rate']} | {r['command']} | "
        f"{r['held_out_loss']:.3f} |"
        for r in facts["runs"]
    )
    seen = sum(r["steps"] * r["tokens_per_step"] for r in facts["runs"])
    return f"""# tiny: a {facts["parameters"]:,}-parameter GPT

A GPT-2-class model (Cerebras-GPT's layout: {CONFIG.n_layer} layers, width {CONFIG.n_embd},
{CONFIG.n_head} heads of {CONFIG.head_dim}, context {CONTEXT}, GELU, vocabulary
{CONFIG.vocab_size}) with its byte-level BPE tokenizer, stored in bfloat16. It writes text that
looks like Python; it is there so that demos and tests run on real language, not to be useful.

- Data: the standard library of Python {facts["python"]} (sources, and the language reference in
  pydoc): {facts["train_documents"]} documents, {facts["train_tokens"]:,} tokens. Those sources are
  under the Python Software Foundation License; no file of them is included here.
- Training: {seen / 1e6:.1f} M tokens in {len(facts["runs"])} runs, each from the weights of the one
  before; AdamW, weight decay .1, gradients clipped to norm 1, linear warm-up and decay.
- Held-out loss: {facts["held_out_loss"]:.3f} nats per token
  ({facts["held_out_bits_per_byte"]:.3f} bits per byte) on {facts["held_out_documents"]} documents
  ({facts["held_out_tokens"]:,} tokens) that were kept out of training and chosen by the hash of
  their names.

| steps | tokens per step | peak learning rate | by | held-out loss after it |
|---|---|---|---|---|
{runs}

The numbers are in training.json too. The held-out loss of another Python version's library
differs, since its files do.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3800)
    parser.add_argument("--out", type=Path, default=TINY, help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, default=Path("build/train_tiny"), help="of the run")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    args = parser.parse_args(argv)
    if not (args.work / "run" / "run.json").is_file():
        shutil.copytree(TINY, args.work / "before", dirs_exist_ok=True)
        for name, text in [pair for part in documents() for pair in part]:
            file = args.work / "text" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8", newline="")
    told = settings(args.work, args.steps)
    console = Console()
    result = run(told, resume=args.resume, console=console)
    if result.finished:
        args.out.mkdir(parents=True, exist_ok=True)
        tokens = data.prepare(told)
        facts = export(result.folder, args.work / "before", tokens, told, args.out)
        console.print(f"held-out loss {facts['held_out_loss']} after {result.steps} steps")


if __name__ == "__main__":
    main()

"""Train the shipped checkpoint: a tokenizer and a 3.6M-parameter GPT on Python's own library.

    python -m cgpt_kernels.assets.train_tiny --steps 4000

The text is what every Python installation carries: the standard library's sources and the language
reference that pydoc shows. File order, split and seeds are fixed, so one Python version and one
machine give the same data and the same run. Interrupted (Ctrl-C) or killed, it goes on from its
last checkpoint; started with fewer --steps it decays the learning rate sooner and finishes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import pydoc_data.topics
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..gpt import GPT, GPTConfig
from . import TINY

END_OF_TEXT = "<|endoftext|>"
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
WINDOWS_PER_STEP = 4  # 2048 tokens: with under 10 M tokens to see, many small steps learn most
SHORT_UNTIL = 0.7  # share of the steps on half-length windows, which train 1.25x faster
PEAK_LR, WARM_UP, DECAY = 1.5e-3, 0.03, 0.3  # trapezoid: shares of the steps that rise and fall
SAVE_EVERY_S = 480
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
    train, held_out = [], []
    for name, text in sorted(found):
        digest = hashlib.sha256(name.encode()).digest()
        (held_out if digest[0] < 4 else train).append((name, text))  # 4 / 256 held out
    return train, held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """GPT-2's kind of tokenizer: byte-level BPE, END_OF_TEXT is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one uint16 stream, each ended by END_OF_TEXT."""
    encoded = tokenizer.encode_batch([text + END_OF_TEXT for text in texts])
    return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in encoded])


def windows(stream: np.ndarray, rows: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [len(rows) * CONTEXT / length, length] of the given CONTEXT-long rows."""
    at = (rows[:, None] * CONTEXT + np.arange(CONTEXT)).reshape(-1, length)
    return torch.from_numpy(stream[at].astype(np.int64)), torch.from_numpy(
        stream[at + 1].astype(np.int64)
    )


def batch(stream: np.ndarray, step: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Step's share of the stream: each epoch visits every window once, in a seeded order."""
    count = (len(stream) - 1) // CONTEXT
    per_epoch = count // WINDOWS_PER_STEP
    order = np.random.default_rng(step // per_epoch).permutation(count)
    first = step % per_epoch * WINDOWS_PER_STEP
    return windows(stream, order[first : first + WINDOWS_PER_STEP], length)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, plateau, linear decay to zero."""
    rise = (step + 1) / max(1, WARM_UP * steps)
    fall = (steps - step) / max(1, DECAY * steps)
    return PEAK_LR * min(1.0, rise, fall)


@torch.no_grad()
def loss_of(model: GPT, stream: np.ndarray) -> float:
    """Mean loss in nats per token over CONTEXT-long windows of the stream, and its remainder."""
    total, count = 0.0, len(stream) - 1
    whole = count // CONTEXT
    for first in range(0, whole, 16):
        x, y = windows(stream, np.arange(first, min(first + 16, whole)), CONTEXT)
        total += model(x, targets=y).item() * y.numel()
    rest = torch.from_numpy(stream[whole * CONTEXT :].astype(np.int64))[None]  # 1 S+1
    if rest.shape[1] > 1:
        total += model(rest[:, :-1], targets=rest[:, 1:]).item() * (rest.shape[1] - 1)
    return total / count


def export(model: GPT, tokenizer: Tokenizer, held_out, facts: dict, out: Path) -> dict:
    """Write the Hugging Face folder, weights in bf16, and measure what was written."""
    GPT.save_pretrained(_copy(model).to(torch.bfloat16), out)
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    write_json(
        out / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "model_max_length": CONTEXT, **special},
    )
    write_json(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    stored = GPT.from_pretrained(out, dtype=torch.float32)
    stream = encode(tokenizer, [text for _, text in held_out])
    loss = loss_of(stored, stream)
    size = sum(len(text.encode()) for _, text in held_out)
    by_size = sorted(held_out, key=lambda d: (abs(len(d[1]) - 8000), d[0]))
    sample = [
        {
            "file": name,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "loss": round(loss_of(stored, encode(tokenizer, [text])), 4),
        }
        for name, text in by_size[:SAMPLE_FILES]
    ]
    facts = facts | {
        "held_out_documents": len(held_out),
        "held_out_tokens": len(stream),
        "held_out_loss": round(loss, 4),
        "held_out_loss_before_rounding": round(loss_of(model, stream), 4),
        "held_out_bits_per_byte": round(loss / np.log(2) * len(stream) / size, 4),
        "held_out_sample": sample,
    }
    write_json(out / "training.json", facts)
    (out / "README.md").write_text(readme(facts), encoding="utf-8")
    return facts


def _copy(model: GPT) -> GPT:
    twin = GPT(model.config)
    twin.load_state_dict(model.state_dict())
    return twin


def write_json(file: Path, data: dict) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def readme(facts: dict) -> str:
    """The model card; every number in it comes from the run."""
    return f"""# tiny: a {facts["parameters"]:,}-parameter GPT

A GPT-2-class model (Cerebras-GPT's layout: {CONFIG.n_layer} layers, width {CONFIG.n_embd},
{CONFIG.n_head} heads of {CONFIG.head_dim}, context {CONTEXT}, GELU, vocabulary
{CONFIG.vocab_size}) with its byte-level BPE tokenizer, stored in bfloat16. It writes text that
looks like Python; it is there so that demos and tests run on real language, not to be useful.

- Data: the standard library of Python {facts["python"]} (sources, and the language reference in
  pydoc): {facts["train_documents"]} documents, {facts["train_tokens"]:,} tokens. Those sources are
  under the Python Software Foundation License; no file of them is included here.
- Training: {facts["steps"]} steps of {facts["tokens_per_step"]} tokens, AdamW (.9, .95), weight
  decay .1, clip 1, peak learning rate {PEAK_LR}; {facts["hours"]:.1f} hours of wall time on one CPU
  thread of a machine busy with other work, pauses included.
- Held-out loss: {facts["held_out_loss"]:.3f} nats per token
  ({facts["held_out_bits_per_byte"]:.3f} bits per byte) on {facts["held_out_documents"]} documents
  ({facts["held_out_tokens"]:,} tokens) that were kept out of training and chosen by the hash of
  their names; {facts["held_out_loss_before_rounding"]:.3f} before rounding to bfloat16.

Made, and measured, by

{_commands(facts["plans"])}

The numbers above are in training.json too. The held-out loss of another Python version's library
differs, since its files do.
"""


def _commands(plans: list[list[int]]) -> str:
    """The runs behind a checkpoint; after a change of --steps they are not one run's schedule."""
    lines = []
    for first, steps in plans:
        note = f"    # from step {first}" if len(plans) > 1 else ""
        lines.append(f"    python -m cgpt_kernels.assets.train_tiny --steps {steps}{note}")
    if len(plans) > 1:
        lines.append(
            "\nThe number of steps was changed on the way, which moves the learning rate's"
        )
        lines.append("decay: one run of the last line alone follows a somewhat different schedule.")
    return "\n".join(lines)


def save_state(file: Path, **state) -> None:
    temporary = file.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, file)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=TINY, help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, default=Path("build/train_tiny"), help="resume state")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    train, held_out = documents()
    tokenizer_file = args.work / "tokenizer.json"
    if tokenizer_file.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        tokenizer = train_tokenizer([text for _, text in train])
        tokenizer.save(str(tokenizer_file))
    stream = encode(tokenizer, [text for _, text in train])

    torch.manual_seed(0)
    model = GPT(CONFIG)
    optimizer = torch.optim.AdamW(model.optimizer_groups(PEAK_LR), betas=(0.9, 0.95), fused=True)
    state_file, step, seconds = args.work / "state.pt", 0, 0.0
    plans = []  # [first step, --steps] of each run whose --steps differed from the one before
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, plans = state["step"], state["seconds"], state["plans"]
    if not plans or plans[-1][1] != args.steps:
        plans.append([step, args.steps])

    def checkpoint() -> dict:
        save_state(
            state_file,
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            step=step,
            seconds=seconds,
            plans=plans,
        )
        facts = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "train_documents": len(train),
            "train_tokens": len(stream),
            "steps": step,
            "plans": plans,
            "tokens_per_step": WINDOWS_PER_STEP * CONTEXT,
            "hours": round(seconds / 3600, 2),
        }
        return export(model, tokenizer, held_out, facts, args.out)

    columns = [TextColumn("step {task.completed}/{task.total}"), BarColumn()]
    columns += [TextColumn("{task.description}"), TimeRemainingColumn()]
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=args.steps, completed=step)
        saved = mean_from = time.monotonic()
        losses = []
        try:
            while step < args.steps:
                start = time.monotonic()
                length = CONTEXT // 2 if step < SHORT_UNTIL * args.steps else CONTEXT
                x, y = batch(stream, step, length)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(x, targets=y)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, args.steps)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                losses.append(loss.item())
                seconds += time.monotonic() - start
                if len(losses) == 50:
                    speed = 50 * x.numel() / (time.monotonic() - mean_from)
                    text = f"loss {np.mean(losses):.3f}, {speed:,.0f} tokens/s"
                    progress.update(bar, description=text)
                    progress.console.print(f"step {step}: {text}")
                    losses, mean_from = [], time.monotonic()
                progress.update(bar, completed=step)
                if time.monotonic() - saved > SAVE_EVERY_S:
                    checkpoint()
                    saved = mean_from = time.monotonic()
                    losses = []
        finally:  # also on Ctrl-C: nothing of the run is lost
            facts = checkpoint()
        progress.console.print(f"held-out loss {facts['held_out_loss']} after {step} steps")


if __name__ == "__main__":
    main()

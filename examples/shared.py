"""What the examples share: text that every Python installation can make, batches, a training loop.

No download: the text is the standard library's, and what Python itself writes about it. Files are
split into training and held-out ones by the hash of their names.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import io
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tokenizers import Tokenizer
from torch import Tensor, nn

from cgpt_kernels.assets import TINY

console = Console()


def sources(count: int) -> list[tuple[str, str]]:
    """(name, text) of `count` modules of the standard library, in the order of their hashes."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.glob("*.py"), key=lambda f: hashlib.sha256(f.name.encode()).digest())
    found = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        if 4_000 < len(text) < 60_000:
            found.append((file.name, text))
    return found[:count]


def held_out(name: str) -> bool:
    """Whether a file is kept out of training: one in five."""
    return hashlib.sha256(b"split" + name.encode()).digest()[0] % 5 == 0


# ---- language modelling: two languages that the tiny checkpoint has hardly seen -----------------


def bytecode(source: str) -> str:
    """A module's bytecode as `dis` lists it, without offsets, line numbers, addresses and sets,
    which change from run to run."""
    out = io.StringIO()
    dis.dis(compile(source, "module", "exec"), file=out, depth=2)
    lines = []
    for line in out.getvalue().splitlines():
        words = line.replace(">>", "").split()
        while words and words[0].isdigit():
            words.pop(0)
        if words and not line.startswith("Disassembly"):
            lines.append(re.sub(r" at 0x\w+|frozenset\(.*\)", "", " ".join(words)))
    return "\n".join(lines)


def syntax_tree(source: str) -> str:
    """A module's syntax tree as `ast.dump` writes it."""
    return ast.dump(ast.parse(source), indent=1)


LANGUAGES = {"bytecode": bytecode, "syntax tree": syntax_tree}


def token_streams(language: str, modules: int = 24) -> tuple[Tensor, Tensor]:
    """Token ids of the training and of the held-out modules in one of LANGUAGES."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    streams = {False: [], True: []}
    for name, source in sources(modules):
        ids = tokenizer.encode(LANGUAGES[language](source)[:20_000]).ids
        streams[held_out(name)].extend(ids)
    return torch.tensor(streams[False]), torch.tensor(streams[True])


def windows(stream: Tensor, length: int, limit: int | None = None) -> Tensor:
    """Whole windows of the stream, [n, length]."""
    n = min(len(stream) // length, limit or len(stream))
    return stream[: n * length].view(n, length)


def random_windows(stream: Tensor, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Windows at random places of the stream, [batch, length], for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        at = torch.randint(len(stream) - length, (batch, 1), generator=generator)
        yield stream[at + torch.arange(length)]


@torch.no_grad()
def language_loss(model: nn.Module, rows: Tensor) -> float:
    """Mean loss in nats per token over windows [n, length]."""
    training = model.training
    model.eval()
    losses = [model(input_ids=r, labels=r).loss.item() * len(r) for r in rows.split(8)]
    model.train(training)
    return sum(losses) / len(rows)


# ---- classification: what is this paragraph? ----------------------------------------------------

KINDS = ("code", "docstring", "comment")


def paragraphs(source: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of a module's functions, docstrings and comments; quotes and # are removed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            docstring = ast.get_docstring(node)
            if docstring:
                yield "docstring", docstring
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            yield "code", "\n".join(ast.unparse(statement) for statement in body)
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        if line.strip().startswith("#"):
            block.append(line.strip().lstrip("#! ").strip())
        elif block:
            yield "comment", "\n".join(block)
            block = []


def labelled(modules: int, length: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """{"train" | "held out": (ids [n, length], mask [n, length], labels [n])}, kinds in balance.

    Padding is on the right; its id is 0, the end of text.
    """
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    found: dict[str, dict[str, list]] = {s: {k: [] for k in KINDS} for s in ("train", "held out")}
    for name, source in sources(modules):
        split = found["held out" if held_out(name) else "train"]
        for kind, text in paragraphs(source):
            ids = tokenizer.encode(text).ids[:length]
            if len(ids) >= 8:
                split[kind].append(ids)
    generator = torch.Generator().manual_seed(0)
    out = {}
    for split, by_kind in found.items():
        each = min(map(len, by_kind.values()))
        ids = torch.zeros(3 * each, length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for label, kind in enumerate(KINDS):
            order = torch.randperm(len(by_kind[kind]), generator=generator)[:each]
            for row, i in enumerate(order.tolist(), label * each):
                text = by_kind[kind][i]
                ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
        order = torch.randperm(3 * each, generator=generator)
        labels = torch.arange(3).repeat_interleave(each)
        out[split] = ids[order], mask[order], labels[order]
    return out


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor, Tensor]) -> float:
    """Share of rows whose largest logit is the label's."""
    training = model.training
    model.eval()
    right = 0
    for ids, mask, labels in zip(*(t.split(64) for t in data), strict=True):
        right += int((model(ids, attention_mask=mask).logits.argmax(-1) == labels).sum())
    model.train(training)
    return right / len(data[2])


def random_rows(data: tuple[Tensor, ...], batch: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Keyword arguments of a classifier for random rows of the data, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        at = torch.randint(len(data[2]), (batch,), generator=generator)
        ids, mask, labels = (t[at] for t in data)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


# ---- training ------------------------------------------------------------------------------------


def train(
    what: str, model: nn.Module, loss_of: Callable[[], Tensor], steps: int, lr: float
) -> float:
    """AdamW on what requires a gradient, warm-up and linear decay; returns the seconds it took."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / steps)
    )
    model.train()
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
    ]
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(what, total=steps)
        for _ in range(steps):
            loss = loss_of()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.update(bar, advance=1, description=f"{what}: loss {loss.item():.3f}")
    return time.perf_counter() - start


def trainable(model: nn.Module) -> str:
    """How many parameters train, of how many."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    some, every = sum(n for n, wanted in sizes if wanted), sum(n for n, _ in sizes)
    return f"{some:,} of {every:,} parameters ({100 * some / every:.1f} %)"

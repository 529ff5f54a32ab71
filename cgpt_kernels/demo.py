"""The whole way on real input: `cgpt-kernels demo`, and the end-to-end rows of `bench e2e`.

Eager is the model as it came; replaced is a second model object on the same parameters after
`ck.replace`. Both generate in turns, and a speed-up counts only where the outputs agree.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from . import timing
from .assets import TINY
from .doctor import doctor
from .generate import generate
from .gpt import GPT, GPTConfig
from .replace import replace
from .testing import FORWARD_FACTOR, SLACK

PREFILL, DECODE = 512, 64  # tokens
ERROR_TOKENS = 128  # positions whose logits are compared with fp64: 128 x 50257 of them, 51 MB
PROMPT = 'def read_lines(path):\n    """Return the lines of a file'
# Greedy text of a model this small soon turns in circles; with one seed both draw the same numbers.
SAMPLING = {"temperature": 0.7, "top_k": 40, "seed": 0}
# The shape of the shipped model, for an installation without it.
TINY_SHAPE = GPTConfig(vocab_size=4097, n_positions=512, n_embd=192, n_layer=6, n_head=3)


@dataclass(frozen=True)
class Rates:
    """Seconds to the first token and per further token: minimum and median over the rounds."""

    prefill: float
    prefill_median: float
    token: float
    token_median: float


@dataclass(frozen=True)
class Row:
    """One model in one dtype, eager beside replaced.

    same: leading tokens equal in every round, of `tokens`.
    error, eager_error: largest absolute error of the logits against fp64; None where not measured.
    scale: largest absolute logit in fp64.
    """

    model: str
    dtype: str
    prompt: int
    tokens: int
    rounds: int
    eager: Rates
    replaced: Rates
    same: int
    eager_error: float | None = None
    error: float | None = None
    scale: float | None = None

    @property
    def red(self) -> str | None:
        """What disagrees, so that no speed-up may be claimed; None when all is well.

        fp32 must give eager's tokens. In 16 bits near-ties among logits fall either way, and the
        error of the logits decides.
        """
        if self.dtype == "fp32" and self.same < self.tokens:
            return f"token {self.same + 1} of {self.tokens} differs from eager's"
        if self.error is not None and self.eager_error is not None:
            if not self.error <= FORWARD_FACTOR * self.eager_error + SLACK * (self.scale or 0.0):
                return f"logits error {self.error:.2e}, eager's is {self.eager_error:.2e}"
        return None

    @property
    def speedups(self) -> tuple[float, float]:
        """Prefill and decode, medians; NaN on a red row."""
        if self.red:
            return math.nan, math.nan
        return (
            self.eager.prefill_median / self.replaced.prefill_median,
            self.eager.token_median / self.replaced.token_median,
        )


class Steps:
    """Progress: a moving line on a terminal, one plain line per step elsewhere."""

    def __init__(self, console: Console, total: int):
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=total)

    def __enter__(self) -> Steps:
        self.progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self.progress.stop()

    def step(self, what: str) -> None:
        """The next step begins."""
        if self.progress.disable:
            self.console.print(f"- {what}", markup=False, highlight=False)
        self.progress.update(self.task, description=what, advance=1)


def transformers_missing() -> str | None:
    """Why the reference GPT stands in for Hugging Face's model, or None."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: cgpt_kernels.GPT, the reference, stands in"
    return None


def load_tiny(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, str]:
    """The shipped model and its name; random weights of its shape where it is not shipped."""
    if not (TINY / "config.json").is_file():
        return random_model(TINY_SHAPE, dtype), "tiny shape, random weights"
    if transformers_missing():
        return GPT.from_pretrained(TINY, dtype=dtype), "tiny"
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(TINY, dtype=dtype).eval(), "tiny"


def random_model(config: GPTConfig, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """transformers' GPT2LMHeadModel with random weights; the reference GPT where it cannot be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if transformers_missing() or config.is_mup:  # transformers has no muP
            return GPT(config).to(dtype).eval()
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(GPT2Config(**config.to_dict())).to(dtype).eval()


def twin(model: nn.Module) -> nn.Module:
    """A second model object on the same parameters and buffers: no second copy of the weights."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in shared})


def _timed_generate(
    model: nn.Module, ids: Tensor, new_tokens: int, sampling: dict
) -> tuple[float, float, Tensor]:
    """Seconds to the first token, seconds per further token, and the new tokens."""
    stamps = [time.perf_counter()]

    def stream(_):
        stamps.append(time.perf_counter())

    out = generate(model, ids, new_tokens, stream=stream, **sampling)
    further = (stamps[-1] - stamps[1]) / (new_tokens - 1)
    return stamps[1] - stamps[0], further, out[0, ids.shape[1] :]


def race(
    models: dict[str, nn.Module],
    ids: Tensor,
    new_tokens: int,
    *,
    seconds: float,
    step: Callable[[str], None] = lambda what: None,
    rounds: tuple[int, int] = (3, 9),
    sampling: dict | None = None,
) -> tuple[dict[str, Rates], int, dict[str, Tensor], int]:
    """Generation by each model in turns.

    Args:
        new_tokens: at least 2.
        seconds: begin no further round after this time, but do rounds[0] at least and at most
            rounds[1].
        sampling: options of `generate`, with a seed; None is greedy.
    Returns:
        rates by name, leading tokens that are equal in all, the tokens by name, rounds done.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    tokens: dict[str, Tensor] = {}
    same = new_tokens
    for model in models.values():  # page faults, lazily built tables
        generate(model, ids, 2)
    began, done = time.perf_counter(), 0
    while done < rounds[0] or (done < rounds[1] and time.perf_counter() - began < seconds):
        step(f"round {done + 1}")
        names = list(models)
        for name in names[:: 1 if done % 2 == 0 else -1]:  # neither always goes first
            prefill, token, tokens[name] = _timed_generate(
                models[name], ids, new_tokens, sampling or {}
            )
            taken[name].append((prefill, token))
        first, *others = tokens.values()
        for other in others:
            unequal = (first != other).nonzero()
            same = min(same, int(unequal[0]) if len(unequal) else new_tokens)
        done += 1
    rates = {}
    for name, rows in taken.items():
        prefill, token = zip(*rows, strict=True)
        rates[name] = Rates(
            min(prefill), statistics.median(prefill), min(token), statistics.median(token)
        )
    return rates, same, tokens, done


@torch.no_grad()
def logits_errors(models: dict[str, nn.Module], ids: Tensor) -> tuple[dict[str, float], float]:
    """Largest absolute error of each model's logits against the first one's in fp64, and the
    largest absolute logit."""

    def logits(model):
        out = model(ids)
        return getattr(out, "logits", out)[0].double()  # S V

    truth = logits(copy.deepcopy(next(iter(models.values()))).double())
    errors = {name: (logits(model) - truth).abs().max().item() for name, model in models.items()}
    return errors, truth.abs().max().item()


def end_to_end(
    name: str,
    dtypes: Iterable[str] = ("fp32", "bf16"),
    *,
    prompt: int = PREFILL,
    new_tokens: int = DECODE,
    seconds: float = 30.0,
    step: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Prefill, decode and logits error of a published shape with random weights.

    Args:
        name: of GPTConfig.from_name, e.g. "cerebras-gpt-111m".
        dtypes: "fp32", "bf16", "fp16".
        prompt, new_tokens: random tokens read at once, and tokens written one by one.
        seconds: of measuring per dtype, exceeded where 3 rounds take longer.
        step: called with what comes next.
    Raises:
        ValueError: unknown name or dtype, or more tokens than the model has positions.
    """
    config = GPTConfig.from_name(name)
    given = [(short, timing.dtype_named(short)) for short in dtypes]
    ids = torch.randint(config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    rows = []
    for short, dtype in given:
        step(f"{name} {short}: making it")
        eager = random_model(config, dtype)
        models = {"eager": eager, "replaced": twin(eager)}
        replace(models["replaced"])
        step(f"{name} {short}: logits against fp64")
        errors, scale = logits_errors(models, ids[:, :ERROR_TOKENS])
        rates, same, _, rounds = race(
            models,
            ids,
            new_tokens,
            seconds=seconds,
            step=lambda what, short=short: step(f"{name} {short}: generating, {what}"),
        )
        measured = rounds, rates["eager"], rates["replaced"], same
        compared = errors["eager"], errors["replaced"], scale
        rows.append(Row(name, short, prompt, new_tokens, *measured, *compared))
    return rows


def table(rows: list[Row], title: str = "") -> Table:
    """Medians of each row, and what was compared."""
    columns = ["model", "dtype", "what", "eager", "replaced", "speed-up", "outputs"]
    out = Table(*columns, box=box.SIMPLE_HEAD, title=title or None, pad_edge=False)
    for column in out.columns[3:6]:
        column.justify = "right"
    for row in rows:
        prefill, decode = ("-" if math.isnan(s) else f"{s:.2f}x" for s in row.speedups)
        e, r = row.eager, row.replaced
        same = "all" if row.same == row.tokens else f"first {row.same}"
        agreement = f"{same} of {row.tokens} tokens equal"
        out.add_row(
            row.model,
            row.dtype,
            f"prefill {row.prompt}",
            f"{e.prefill_median * 1e3:.1f} ms",
            f"{r.prefill_median * 1e3:.1f} ms",
            prefill,
            f"[red]{row.red}[/]" if row.red else agreement,
        )
        out.add_row(
            "",
            "",
            f"decode {row.tokens}",
            f"{1 / e.token_median:.1f} tok/s",
            f"{1 / r.token_median:.1f} tok/s",
            decode,
            "" if not row.red else agreement,
        )
        if row.error is not None:
            out.add_row(
                "",
                "",
                "logits error",
                f"{row.eager_error:.1e}",
                f"{row.error:.1e}",
                "",
                f"against fp64, logits up to {row.scale:.1f}",
            )
    return out


def write(path: str | Path, rows: list[Row]) -> Path:
    """The rows, with the machine they were taken on, as JSON."""
    found = [asdict(row) | {"red": row.red, "speedups": row.speedups} for row in rows]
    for row in found:  # NaN is no JSON
        row["speedups"] = [None if math.isnan(s) else s for s in row["speedups"]]
    return timing.write(Path(path), found)


def _tiny(step: Callable[[str], None], seconds: float, tokens: int) -> tuple[Row, str, bool]:
    """The tiny model's row, the text that it wrote, and whether both wrote the same."""
    eager, name = load_tiny()
    models = {"eager": eager, "replaced": twin(eager)}
    replace(models["replaced"])
    if name == "tiny":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
        ids, decode = torch.tensor([tokenizer.encode(PROMPT).ids]), tokenizer.decode
    else:  # random weights write nothing worth reading
        ids, decode = torch.arange(1, 17)[None], lambda found: f"{len(found)} random tokens"
    rates, same, written, rounds = race(
        models,
        ids,
        tokens,
        seconds=seconds,
        step=lambda what: step(f"{name}: generating, {what}"),
        sampling=SAMPLING,
    )
    first, second = (t.tolist() for t in written.values())
    measured = rounds, rates["eager"], rates["replaced"], same
    row = Row(name, "fp32", ids.shape[1], tokens, *measured)
    return row, decode(ids[0].tolist() + first), first == second


def run(
    console: Console,
    *,
    model: str = "cerebras-gpt-111m",
    prompt: int = PREFILL,
    new_tokens: int = DECODE,
    seconds: float = 30.0,
    out: str | Path | None = None,
) -> bool:
    """Show everything; True when all outputs agree.

    Args:
        model: published shape of the second part; prompt, new_tokens: its tokens.
        seconds: of measuring per model and dtype, a third of it for the tiny model.
        out: JSON file for the rows.
    """
    GPTConfig.from_name(model)  # an unknown name is told before a minute has passed
    console.rule("this machine")
    console.print(doctor())
    if transformers_missing():
        console.print(transformers_missing(), style="yellow")
    with Steps(console, total=2 * (2 + 9) + 9) as steps:
        row, text, same = _tiny(steps.step, seconds / 3, tokens=128)
        rows = [
            row,
            *end_to_end(
                model, prompt=prompt, new_tokens=new_tokens, seconds=seconds, step=steps.step
            ),
        ]
    console.rule(f"{row.model}: what it writes")
    console.print(text, markup=False, highlight=False)
    console.print("eager and replaced wrote the same text" if same else "the texts differ")
    kind = "the reference GPT" if transformers_missing() else "transformers' GPT2LMHeadModel"
    console.rule(f"eager and replaced, {torch.get_num_threads()} threads")
    console.print(table(rows))
    console.print(
        f"{kind}; {model} with random weights, greedy; batch 1; medians of "
        f"{min(r.rounds for r in rows)} to {max(r.rounds for r in rows)} rounds in turns",
        style="dim",
    )
    if out is not None:
        console.print(f"written to {write(out, rows)}", markup=False, highlight=False)
    return same and not any(row.red for row in rows)

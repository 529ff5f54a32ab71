"""The training loop."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import checkpoint, timing
from ..gpt import GPT, GPTConfig
from ..replace import replace
from . import data, files, progress, state
from .evaluate import loss_of
from .order import Mixture, Windows
from .settings import Plan, Settings, new_config, plan, with_dropout

# Settings that a resumed run may have anew. Most say where and what is told, not what is computed;
# a different number of threads costs the last bits (machines differ), and a different length moves
# the rest of the learning rate's decay.
CHANGEABLE = ("out", "threads", "keep", "log_every", "tensorboard", "steps", "tokens")
_ADAM_EPS = 1e-8
_LOCK = ".lock"
_SEED_STRIDE = 1_000_003  # a prime: runs whose seeds are neighbours share no step's seed


@dataclass(frozen=True)
class Result:
    """How a run ended: `folder` is its last checkpoint."""

    folder: Path
    step: int
    steps: int
    loss: float | None
    held_out_loss: float | None
    replay_held_out_loss: float | None

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


def run(settings: Settings, *, resume: bool = False, console=None) -> Result:
    """Train as the settings say, until the last step or an interrupt (Ctrl-C, SIGTERM).

    resume: go on from the last whole checkpoint in settings.out, or begin where there is none;
        the settings must be the run's own, but for those that CHANGEABLE names.
    console: a rich.console.Console to tell progress to; None: silence.

    Raises ValueError for settings, data or a folder that cannot be trained with, OSError where a
    checkpoint cannot be written, RuntimeError where the loss is not a number any more.
    """
    if settings.tensorboard:
        progress.check_tensorboard()
    out = Path(settings.out)
    _check_folder(out, settings, resume)
    made = [p for p in (out, *out.parents) if not p.exists()]
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out), timing.threads(settings.threads):
        files.sweep(out)
        if (out / "run.json").is_file():
            prepared = _Run(settings, console)
            files.write(out / "run.json", settings.to_json())
        else:
            files.write(out / "run.json", settings.to_json())
            try:
                prepared = _Run(settings, console)
            except Exception:  # nothing began: the folder is free for settings that are right
                files.sweep(out)
                if (out / "tokens").is_dir():
                    files.delete(out / "tokens")
                (out / "run.json").unlink()
                (out / _LOCK).unlink()
                with suppress(OSError):  # hidden files of others may be in it
                    for folder in made:
                        folder.rmdir()
                raise
        return prepared.train(console)


def stored(out: str | os.PathLike) -> Settings | None:
    """The settings of the run in the folder `out`; None where there is none."""
    file = Path(out) / "run.json"
    return Settings.from_json(file.read_text(encoding="utf-8")) if file.is_file() else None


def _check_folder(out: Path, settings: Settings, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"train: out must be a folder, {out} is a file")
    before = stored(out)
    if before is None:
        foreign = (
            [p.name for p in out.iterdir() if not p.name.startswith(".")] if out.exists() else []
        )
        if foreign:
            raise ValueError(
                f"train: out must be a new or empty folder, {out} holds {sorted(foreign)[0]}"
            )
        return
    if not resume:
        raise ValueError(f"train: {out} holds a run; go on with --resume, or name another folder")
    changed = [
        name
        for name, value in vars(settings).items()
        if name not in CHANGEABLE and value != getattr(before, name)
    ]
    if changed:
        raise ValueError(
            f"train: the run in {out} was begun with other settings: "
            + ", ".join(f"{n} {getattr(before, n)!r}" for n in changed)
        )


class _Run:
    """Weights, moments and data of a run, as they are after `step` steps."""

    def __init__(self, settings: Settings, console):
        self.settings, self.out = settings, Path(settings.out)
        self.tokens, self.weights = _begin(settings, console)
        config = self.weights.config
        parameters = sum(p.numel() for p in self.weights.parameters())
        self.plan: Plan = plan(settings, config, parameters)
        self.data, self.held_out = _order(settings, self.tokens, self.plan.context)
        self.optimizer = torch.optim.AdamW(
            self.weights.optimizer_groups(self.plan.lr, settings.weight_decay),
            betas=(0.9, settings.beta2),
            eps=_ADAM_EPS,
            fused=True,
        )
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.step = 0
        found = state.folders(self.out)
        if found:
            self.step = state.load_moments(found[-1], self.weights, self.optimizer)
            state.tidy(self.out, settings.keep)
        self.model = self._computing()
        self.parameters = parameters

    def _computing(self) -> GPT:
        """The model that computes: the weights themselves, or their copy in bf16; replaced."""
        model = self.weights
        if self.settings.dtype == "bf16":
            model = GPT(model.config).to(torch.bfloat16)
            self._round(model)
        if self.settings.backend != "eager":
            replace(model, backend=self.settings.backend)
        return model.train()

    @torch.no_grad()
    def _round(self, model: GPT) -> None:
        for p, wide in zip(model.parameters(), self.weights.parameters(), strict=True):
            p.copy_(wide)

    def train(self, console) -> Result:
        settings, plan = self.settings, self.plan
        bar = progress.Progress(console, self.out, plan.steps, self.step, settings.tensorboard)
        with bar, _interrupts() as interrupted:
            self._introduce(bar)
            peak = progress.peak_flops(self.model.lm_head.weight.dtype) if console else None
            per_token = progress.flops_per_token(self.weights.config, plan.context)
            losses, began, result = [], time.perf_counter(), self._result(None, {})
            while self.step < plan.steps and not interrupted:
                loss, norm = self._one_step()
                losses.append(loss)
                bar.advance(self.step)
                if self.step % settings.log_every == 0 or self.step == plan.steps:
                    now = time.perf_counter()
                    rate = len(losses) * plan.tokens_per_step / (now - began)
                    share = {"share_of_bound": rate * per_token / peak} if peak else {}
                    bar.scalars(
                        self.step,
                        loss=sum(losses) / len(losses),
                        learning_rate=plan.lr * plan.factor(self.step - 1, settings),
                        gradient_norm=norm,
                        tokens_per_second=rate,
                        **share,
                    )
                    losses, began = [], now
                measured = {}
                paused = time.perf_counter()
                if self.step % plan.held_out_every == 0 or self.step == plan.steps:
                    measured = self._measure()
                    bar.scalars(self.step, **measured)
                if self.step % plan.save_every == 0 or self.step == plan.steps or interrupted:
                    self._save(measured.get("held_out_loss"))
                    result = self._result(loss, measured)
                began += time.perf_counter() - paused
            return result

    def _introduce(self, bar: progress.Progress) -> None:
        settings, about, plan = self.settings, self.tokens.about, self.plan
        text = len(self.data.main.stream)
        bar.tell(
            f"{self.parameters / 1e6:.2f} M parameters, {text:,} tokens of text; "
            f"{plan.steps} steps of {plan.tokens_per_step} tokens: "
            f"{plan.steps * plan.tokens_per_step / self.parameters:.1f} tokens per parameter, "
            f"{plan.steps * plan.tokens_per_step / text:.1f} times the text; "
            f"peak learning rate {plan.lr:.2e}, {plan.warmup} steps of warm-up, {settings.dtype}"
        )
        if about["skipped"]:
            names = about["skipped"]
            bar.tell(
                f"left out, as they are empty or no UTF-8 text: {len(names)} ({names[0]} first)"
            )
        if self.held_out["held_out_loss"] is None:
            bar.tell("nothing is held out: the text is too short, and the best is not known")
        if self.step:
            bar.tell(f"going on after step {self.step}")

    def _one_step(self) -> tuple[float, float]:
        """(mean loss, norm of the gradient) of the next step."""
        settings = self.settings
        # A function of the step, so that no state of a generator has to outlive the process.
        torch.manual_seed((settings.seed * _SEED_STRIDE + self.step) % 2**63)
        factor = self.plan.factor(self.step, settings)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        total, first = 0.0, self.step * settings.windows
        for part in range(settings.accumulate):
            inputs, targets = self.data.batch(first + part * settings.batch, settings.batch)
            loss = self.model(inputs, targets=targets)
            (loss / settings.accumulate).backward()
            self._collect()
            total += loss.item() / settings.accumulate
        if not math.isfinite(total):
            found = state.folders(self.out)
            raise RuntimeError(
                f"train: the loss of step {self.step + 1} is {total}: train with a lower lr, now "
                f"{self.plan.lr:.2e} at its peak, into another folder"
                + (f"; the last checkpoint is {found[-1]}" if found else "")
            )
        norm = torch.nn.utils.clip_grad_norm_(self.weights.parameters(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.model is not self.weights:
            self._round(self.model)
        self.step += 1
        return total, norm.item()

    @torch.no_grad()
    def _collect(self) -> None:
        """Add the bf16 gradients of a pass to the sums in fp32."""
        if self.model is self.weights:
            return
        for p, wide in zip(self.model.parameters(), self.weights.parameters(), strict=True):
            if p.grad is not None:
                wide.grad = p.grad.float() if wide.grad is None else wide.grad.add_(p.grad)
                p.grad = None

    def _measure(self) -> dict[str, float]:
        context, limit = self.plan.context, self.settings.held_out_tokens
        return {
            name: loss_of(self.model, stream, length=context, limit=limit)
            for name, stream in self.held_out.items()
            if stream is not None
        }

    def _save(self, held_out_loss: float | None) -> None:
        state.save(
            self.out,
            self.step,
            self.weights,
            self.optimizer,
            self.tokens.folder,
            held_out_loss,
            self.settings.keep,
        )

    def _result(self, loss: float | None, measured: dict[str, float]) -> Result:
        found = state.folders(self.out)
        held_out = measured.get("held_out_loss")
        if found and not measured:
            held_out = state.facts(found[-1])["held_out_loss"]
        return Result(
            folder=found[-1] if found else self.out,
            step=self.step,
            steps=self.plan.steps,
            loss=loss,
            held_out_loss=held_out,
            replay_held_out_loss=measured.get("replay_held_out_loss"),
        )


def _begin(settings: Settings, console) -> tuple[data.Tokens, GPT]:
    """The token streams, and the weights in fp32 that the run begins with."""

    def told(text: str) -> None:
        if console is not None:
            console.print(text, markup=False, highlight=False)

    source, found = settings.model, state.folders(Path(settings.out))
    if found:  # neither the text nor the first weights need be there any more
        return data.prepare(settings), GPT.from_pretrained(found[-1], dtype=torch.float32)
    # The model is looked at first: what is wrong with it is not told after hours of text.
    if settings.fine_tunes:
        if not Path(source).is_dir():
            raise ValueError(
                f"train: model must be a checkpoint's folder or one of "
                f"{', '.join(GPTConfig.names())}, got {source!r}"
            )
        checkpoint.check_not_quantized("train", source)
        weights = GPT.from_pretrained(source, dtype=torch.float32)
        config = weights.config
        if settings.context and settings.context > config.n_positions:
            raise ValueError(
                f"train: context must be at most the model's n_positions = {config.n_positions}, "
                f"got {settings.context}"
            )
        tokens = data.prepare(settings, config.vocab_size, told)
        trained = GPT(with_dropout(config, settings.dropout))
        trained.load_state_dict(weights.state_dict())
        return tokens, trained
    new_config(settings, 1, None)
    tokens = data.prepare(settings, source and GPTConfig.from_name(source).vocab_size, told)
    torch.manual_seed(settings.seed)
    about = tokens.about
    return tokens, GPT(new_config(settings, about["vocab_size"], about["end_of_text"]))


def _order(settings: Settings, tokens: data.Tokens, context: int):
    """(the windows to train on, the streams to measure on by the names of their losses)."""
    main = Windows(tokens.stream("train"), context, settings.seed, "the text")
    held_out = {"held_out_loss": tokens.stream("held_out")}
    if not settings.replay:
        return Mixture(main), held_out
    replay = Windows(tokens.stream("replay"), context, settings.seed + 1, "the replayed text")
    held_out["replay_held_out_loss"] = tokens.stream("replay_held_out")
    return Mixture(main, replay, settings.replay_share), held_out


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Refuse a second process; the lock goes with the process, however that ends."""
    with open(out / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(lock.fileno()).st_nlink:  # removed since: another may hold the next
                raise BlockingIOError
        except BlockingIOError:
            raise ValueError(f"train: another process is training in {out}") from None
        yield


@contextmanager
def _interrupts() -> Iterator[list]:
    """A list that is empty until Ctrl-C or SIGTERM; a second one is not held back."""
    came: list[int] = []
    before = {}

    def note(number, frame):
        came.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, note)
        except ValueError:  # not the main thread, which alone receives signals
            break
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""What a run is told, and Cerebras-GPT's recipe for what it is not told.

Sources: Cerebras-GPT (arXiv 2304.03208) and its published configurations (Cerebras/modelzoo,
src/cerebras/modelzoo/models/nlp/gpt3/configs/Cerebras_GPT): AdamW with betas .9 and .95, eps 1e-8,
decay .1, gradients clipped to norm 1, linear warm-up over 375 M tokens, linear decay to a tenth, 20
tokens per parameter (Hoffmann et al., arXiv 2203.15556); muP: base width 256, init .08, embeddings
x 10, learning rate 6e-3 (script convert_config_to_mup.py there; the rules are Tensor Programs V,
arXiv 2203.03466, table 8 as Cerebras-GPT's table 14 applies them to a tied head).
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass

from .. import checks
from ..backends import BACKENDS
from ..gpt import GPTConfig

SCHEDULES = ("linear", "cosine")
DTYPES = ("fp32", "bf16")
TOKENS_PER_PARAMETER = 20
WARM_UP_TOKENS, WARM_UP_SHARE = 375e6, 0.17  # of 111M's run, the shortest, 375 M tokens are 17 %
MUP_BASE_WIDTH, MUP_INIT, MUP_EMBEDDINGS, MUP_LR = 256, 0.08, 10.0, 6e-3
# Peak learning rates of the published models, by width.
_PUBLISHED_LR = {768: 6e-4, 1088: 6e-4, 1536: 2e-4, 2048: 2e-4, 2560: 2e-4, 4096: 1.2e-4}
_PUBLISHED_LR[5120] = 1.2e-4
_FINE_TUNING = 0.1  # of the rate from scratch: trained weights are near where they should be
_SHAPE = {"width": 256, "layers": 4, "heads": None, "context": 256, "mup": False}


@dataclass(frozen=True)
class Settings:
    """A run from scratch, or from the checkpoint that `model` names. None: the default, told below.

    data, held_out, replay: files, folders or glob patterns of UTF-8 text.
    out: the run's folder.
    model: a preset's name (random weights), a checkpoint's folder (its weights), or None: a new
        model of `width` (256), `layers` (4), `heads` (width / 64), `mup` (no).
    tokenizer: tokenizer.json or a folder with one; None: the checkpoint's, or one of at most
        `vocab_size` (a preset's, or 4097) tokens is made from the data.
    context: tokens per training window; the model's n_positions, or 256.
    steps, tokens: the length of the run, one of them; 20 tokens per parameter.
    batch, accumulate: windows per pass, and passes per step.
    lr: peak; the published one of that width, or Kaplan et al.'s by size, muP's 6e-3, and a tenth
        of that for a checkpoint's weights. Under muP hidden matrices take lr x 256 / width.
    warmup: steps; 375 M tokens, but at most a sixth of the run.
    final_lr: share of the peak that is left at the last step.
    dropout: of embeddings, attention weights and residual branches.
    dtype: "bf16" computes in bf16; weights, moments and sums of gradients are fp32 all the same.
    backend: as in `replace`; "eager" trains the model as it is.
    threads: of the CPU, torch's own number; the last bits of the weights depend on it.
    held_out_share: of the documents, chosen by their names' hashes, or the end of the text where
        there are few.
    save_every, held_out_every: steps; a twentieth of the run; default of the second: the first.
    replay_share: of the training windows, taken from `replay`.
    """

    data: tuple[str, ...]
    out: str
    model: str | None = None
    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    context: int | None = None
    mup: bool | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    steps: int | None = None
    tokens: int | None = None
    batch: int = 8
    accumulate: int = 1
    lr: float | None = None
    schedule: str = "linear"
    warmup: int | None = None
    final_lr: float = 0.1
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    dropout: float = 0.0
    dtype: str = "fp32"
    backend: str = "auto"
    threads: int | None = None
    seed: int = 0
    held_out: tuple[str, ...] = ()
    held_out_share: float = 0.01
    held_out_tokens: int = 100_000
    held_out_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    log_every: int = 10
    replay: tuple[str, ...] = ()
    replay_share: float | None = None
    tensorboard: bool = False

    def __post_init__(self):
        for name in ("data", "held_out", "replay"):
            object.__setattr__(self, name, tuple(str(path) for path in getattr(self, name)))
        if not self.data:
            raise ValueError("train: data must name at least one file, folder or pattern")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"train: {name} must be a positive integer, got {value!r}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"train: {name} must lie in [{low}, {high}], got {value!r}")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"train: lr must be positive, got {self.lr!r}")
        if self.steps and self.tokens:
            raise ValueError("train: give steps or tokens, not both")
        if self.warmup is not None and self.warmup < 0:
            raise ValueError(f"train: warmup must not be negative, got {self.warmup}")
        checks.is_choice("train", "schedule", self.schedule, SCHEDULES)
        checks.is_choice("train", "dtype", self.dtype, DTYPES)
        checks.is_choice("train", "backend", self.backend, ("auto", *BACKENDS))
        if bool(self.replay) != (self.replay_share is not None):
            raise ValueError("train: replay and replay_share go together")
        if self.model is not None:
            given = [n for n in ("width", "layers", "heads", "mup") if getattr(self, n) is not None]
            if given:
                raise ValueError(
                    f"train: {', '.join(given)} describe a new model, not {self.model!r}"
                )

    @property
    def fine_tunes(self) -> bool:
        """Whether the run begins with a checkpoint's weights."""
        return self.model is not None and self.model.lower() not in GPTConfig.names()

    @property
    def windows(self) -> int:
        """Training windows per step."""
        return self.batch * self.accumulate

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Settings:
        return cls(**json.loads(text))


_COUNTS = ("width", "layers", "heads", "context", "vocab_size", "steps", "tokens", "batch")
_COUNTS += (
    "accumulate",
    "threads",
    "held_out_tokens",
    "held_out_every",
    "save_every",
    "keep",
    "log_every",
)
_RANGES = (("dropout", 0, 0.99), ("final_lr", 0, 1), ("beta2", 0, 0.9999), ("replay_share", 0, 1))
_RANGES += (("held_out_share", 0, 0.5), ("weight_decay", 0, 1), ("clip", 1e-6, 1e6))


@dataclass(frozen=True)
class Plan:
    """A run's numbers, every default filled in."""

    steps: int
    warmup: int
    lr: float
    context: int
    tokens_per_step: int
    save_every: int
    held_out_every: int

    def factor(self, step: int, settings: Settings) -> float:
        """Share of the peak learning rate at step 0, 1, ..., steps - 1."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        left = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return settings.final_lr + (1 - settings.final_lr) * left


def new_config(settings: Settings, vocab_size: int, end_of_text: int | None) -> GPTConfig:
    """The model that is to be trained from scratch."""
    if settings.model is not None:
        config = GPTConfig.from_name(settings.model)
        n_positions = settings.context or config.n_positions
        changes = {"vocab_size": vocab_size, "n_positions": n_positions}
    else:
        width = settings.width or _SHAPE["width"]
        config = GPTConfig(
            n_embd=width,
            n_layer=settings.layers or _SHAPE["layers"],
            n_head=settings.heads or max(1, width // 64),
            n_positions=settings.context or _SHAPE["context"],
            vocab_size=vocab_size,
        )
        changes = {}
        if settings.mup:
            changes = mup_fields(width)
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    return with_dropout(dataclasses.replace(config, **changes, **ends), settings.dropout)


def with_dropout(config: GPTConfig, p: float) -> GPTConfig:
    """The same model with dropout of probability p everywhere that it has one."""
    return dataclasses.replace(config, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p)


def mup_fields(width: int, base: int = MUP_BASE_WIDTH) -> dict:
    """GPTConfig's fields for Cerebras-GPT's muP."""
    return {
        "initializer_range": MUP_INIT,
        "mup_embeddings_scale": MUP_EMBEDDINGS,
        "mup_width_scale": base / width,
        "mup_scale_qk_dot_by_d": True,
    }


def plan(settings: Settings, config: GPTConfig, parameters: int) -> Plan:
    """Fill in what the settings leave open."""
    context = settings.context or config.n_positions
    per_step = settings.windows * context
    tokens = settings.tokens or TOKENS_PER_PARAMETER * parameters
    steps = settings.steps or max(1, tokens // per_step)
    warmup = settings.warmup
    if warmup is None:
        warmup = int(min(WARM_UP_TOKENS / per_step, WARM_UP_SHARE * steps))
    lr = settings.lr
    if lr is None:
        if config.is_mup:
            lr = MUP_LR
        else:  # Kaplan et al. (arXiv 2001.08361), equation D.1, where nothing is published
            kaplan = max(0.003239 - 0.0001395 * math.log(parameters), 1e-4)
            lr = _PUBLISHED_LR.get(config.n_embd, kaplan)
        lr *= _FINE_TUNING if settings.fine_tunes else 1.0
    save_every = settings.save_every or max(min(steps, 10), steps // 20)
    return Plan(
        steps=steps,
        warmup=min(warmup, steps),
        lr=lr,
        context=context,
        tokens_per_step=per_step,
        save_every=save_every,
        held_out_every=settings.held_out_every or save_every,
    )

"""Which systems there are, which of them can run here, and what they are asked to do."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

FORMATS = ("fp32", "bf16", "int8", "int4")
# In the order of the tables; each is a file of bench/peers.
NAMES = (
    "ours_gpt",
    "ours_hf",
    "ours_hf_generate",
    "hf_generate",
    "hf_eager",
    "torch_sdpa",
    "torch_compile",
    "openvino",
    "llama_cpp",
    "ctranslate2",
)
PEERS = Path(__file__).resolve().parents[2] / "bench" / "peers"


@dataclass(frozen=True)
class Work:
    """Read `prompt` tokens in each of `batch` rows, then write `new_tokens` one by one.

    formats: those measured unless everything is asked for.
    """

    name: str
    batch: int
    prompt: int
    new_tokens: int
    formats: tuple[str, ...] = FORMATS


def works(new_tokens: int, *, prompt: int = 512, long: int = 2048, rows: int = 8) -> list[Work]:
    """The works of the target table."""
    return [
        Work("512", 1, prompt, new_tokens),
        # Two tokens, since its time per token is not asked for.
        Work("2048", 1, long, 2, formats=("bf16",)),
        Work("batch", rows, prompt, new_tokens, formats=("bf16",)),
    ]


@dataclass(frozen=True)
class System:
    """One system in one format, as its file describes it."""

    name: str
    format: str
    title: str
    ours: bool
    note: str
    works: tuple[str, ...] | None

    @property
    def key(self) -> str:
        return f"{self.name}:{self.format}"


@dataclass(frozen=True)
class Absent:
    """A system that does not run, and why."""

    name: str
    title: str
    formats: tuple[str, ...]
    reason: str


def select(chosen: str) -> list[tuple[str, str]]:
    """(name, format) of a choice such as "all", "openvino,llama_cpp:int8" or "all:bf16".

    This project's own systems take part in every format that a peer is chosen in.

    Raises:
        ValueError: unknown name or format.
    """
    wanted: set[tuple[str, str]] = set()
    for item in filter(None, (part.strip() for part in chosen.split(","))):
        name, _, kind = item.partition(":")
        kinds = (kind,) if kind else FORMATS
        if (name != "all" and name not in NAMES) or (kind and kind not in FORMATS):
            raise ValueError(
                f"bench: --peers must be all or a list of {', '.join(NAMES)}, each with or without "
                f":format of {', '.join(FORMATS)}, got {item!r}"
            )
        names = NAMES if name == "all" else (name,)
        wanted |= {(n, k) for n in names for k in kinds if k in _module(n).FORMATS}
    if not wanted:
        raise ValueError(f"bench: --peers names no system that exists, got {chosen!r}")
    present = {kind for _, kind in wanted}
    wanted |= {(n, k) for n in NAMES for k in present if n in own() and k in _module(n).FORMATS}
    return [(name, kind) for kind in FORMATS for name in NAMES if (name, kind) in wanted]


def own() -> tuple[str, ...]:
    """Names of this project's own systems."""
    return tuple(name for name in NAMES if getattr(_module(name), "OURS", False))


def resolve(chosen: list[tuple[str, str]]) -> tuple[list[System], list[Absent]]:
    """The systems that can be started here, and the others with the command that brings them."""
    found, absent = [], {}
    for name, kind in chosen:
        module = _module(name)
        missing = [pip for needed, pip in module.NEEDS.items() if not _installed(needed)]
        if missing:
            formats = (*absent[name].formats, kind) if name in absent else (kind,)
            command = " ".join(f"'{pip}'" for pip in missing)
            reason = f"not installed: pip install {command}"
            absent[name] = Absent(name, module.TITLE, formats, reason)
        else:
            ours, only = getattr(module, "OURS", False), getattr(module, "WORKS", None)
            found.append(System(name, kind, module.TITLE, ours, module.NOTE, only))
    return found, list(absent.values())


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _module(name: str):
    """The file of a system; importing it imports nothing but the standard library."""
    if not PEERS.is_dir():
        raise ValueError(f"bench: --peers needs a checkout with bench/peers, {PEERS} is missing")
    folder = str(PEERS.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(f"peers.{name}")


def helper(name: str):
    """A module of bench/peers that is no system: weights, truth, peaks."""
    return _module(name)

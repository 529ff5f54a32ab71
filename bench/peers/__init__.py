"""Other systems that run the same GPT, one file each, for `cgpt-kernels bench e2e --peers`.

A file `<system>.py` states, with nothing imported but the standard library:

    TITLE     what the tables call it
    FORMATS   of "fp32", "bf16", "int8", "int4", those it has
    NEEDS     {module: what pip installs}
    NOTE      what its numbers include: logits computed in prefill, precision, cache
    WORKS     optional: the works it takes part in, where not all
    OURS      optional: True marks this project
    load(setup) -> session, whose generate(ids, new_tokens, stamp) continues every row of ids
              greedily by new_tokens, calls stamp() when the first and each further token of all
              rows is known, and returns the new tokens

Each system in each format lives in a process of its own (worker.py), told by pipe to run one
repetition at a time: thread pools and OpenMP runtimes of the libraries never meet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Stamp = Callable[[], None]


@dataclass(frozen=True)
class Setup:
    """What a system is given.

    folder: the checkpoint in Hugging Face format, fp32, the same for all systems.
    cache: for converted copies, kept between runs; files in it are complete or absent.
    format: one of the file's FORMATS.
    threads: of the processor.
    """

    folder: Path
    cache: Path
    format: str
    threads: int


class Session(Protocol):
    def generate(self, ids: list[list[int]], new_tokens: int, stamp: Stamp) -> list[list[int]]: ...

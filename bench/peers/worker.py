"""One system in one format in a process of its own, told by pipe what to do.

    python -m peers.worker SYSTEM '{"folder": ..., "cache": ..., "format": ..., "threads": ...}'

Reads one JSON object a line: {"ids": [[...]], "new_tokens": n} runs one repetition. Answers one a
line: {"seconds": [...], "tokens": [[...]]}, seconds from the start to the first token of all rows
and from each token to the next; or {"error": ...}. The first answer comes unasked, when the system
is loaded. The end of the input ends it.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path

from . import Setup


def main() -> None:
    # What libraries print to stdout goes where stderr goes.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields):
        answers.write(json.dumps(fields) + "\n")

    name, given = sys.argv[1], json.loads(sys.argv[2])
    setup = Setup(
        Path(given["folder"]), Path(given["cache"]), given["format"], int(given["threads"])
    )
    try:  # the parent has set OMP_NUM_THREADS, which torch and this project's kernels follow
        session = importlib.import_module(f"peers.{name}").load(setup)
        answer(loaded=True)
        for line in sys.stdin:
            answer(**repetition(session, json.loads(line)))
    except Exception as error:  # reported to the parent, which lists the system with it
        traceback.print_exc()
        answer(error=_first_line(error))
        sys.exit(1)


def repetition(session, request: dict) -> dict:
    """One prefill and its decode steps."""
    stamps = [time.perf_counter()]
    tokens = session.generate(
        request["ids"], request["new_tokens"], lambda: stamps.append(time.perf_counter())
    )
    seconds = [b - a for a, b in itertools.pairwise(stamps)]
    return {"seconds": seconds, "tokens": tokens}


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    main()

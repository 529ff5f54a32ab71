"""Files and folders that appear whole or not at all, whatever kills the process or fills the disk.

Everything is written under a temporary name, flushed to the disk, and renamed: POSIX renames are
atomic, and the flush comes first, so that no rename can outlive its contents in a power cut.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNFINISHED = ".unfinished-"  # what a killed process may leave; `sweep` removes it


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """A new folder to write into; it becomes `path` when the block ends, or vanishes with it."""
    unfinished = path.with_name(_UNFINISHED + path.name)
    _remove(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for file in sorted(unfinished.iterdir()):
            flush(file)
        flush(unfinished)
        os.rename(unfinished, path)
        flush(path.parent)
    finally:
        _remove(unfinished)


def write(path: Path, text: str) -> None:
    """The text into `path`, which is the old file or the new one at every moment."""
    unfinished = path.with_name(_UNFINISHED + path.name)
    try:
        unfinished.write_text(text, encoding="utf-8")
        flush(unfinished)
        os.replace(unfinished, path)
        flush(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def link(path: Path, target: str) -> None:
    """`path` becomes a symbolic link to `target`, from one moment to the next."""
    unfinished = path.with_name(_UNFINISHED + path.name)
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(target)
    os.replace(unfinished, path)


def delete(path: Path) -> None:
    """Remove a folder, which is whole under its name until it is gone from there."""
    doomed = path.with_name(_UNFINISHED + path.name)
    os.rename(path, doomed)
    _remove(doomed)


def sweep(parent: Path) -> None:
    """Remove what a process that was killed has left unfinished in `parent`."""
    for path in parent.glob(f"{_UNFINISHED}*"):
        _remove(path)


def flush(path: Path) -> None:
    """What `path` holds goes to the disk; of a folder, the names in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

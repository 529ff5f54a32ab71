"""Everything that tests and benchmarks go through: each op's function and its cases, by name."""

import importlib

from .. import backends, ops
from .case import Case

FUNCTIONS = {name: getattr(ops, name) for name in ops.__all__}
FOLDERS = sorted({op.folder for op in backends.OPS.values()})
CASES: list[Case] = [
    case
    for folder in FOLDERS
    for case in importlib.import_module(f"{__package__}.{folder}.cases").CASES
]


def cases(use: str, op: str | None = None) -> list[Case]:
    """The cases marked for "test" or "bench", of one op or all."""
    return [case for case in CASES if use in case.use and op in (None, case.op)]

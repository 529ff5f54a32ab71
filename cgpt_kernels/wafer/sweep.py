"""Tables of reports: a row for each combination of machine, grid, mode, algorithm and the like."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Mapping, Sequence

from .report import Report

RESULTS = (
    "cycles",
    "microseconds",
    "tokens_per_second",
    "utilization",
    "sram_bytes_per_core",
    "fits",
)


def sweep(subject: str, axes: Mapping[str, Sequence], make: Callable[..., Report]) -> list[dict]:
    """A row for each combination of the axes' values: the values, RESULTS, and an error.

    Args:
        subject: what is swept, for the first column.
        axes: values by the keyword of `make` that takes them.
        make: makes the report; its ValueError (what the machine or the shapes do not allow) fills
            the row's last column.
    """
    for name, given in axes.items():
        if not given:
            raise ValueError(f"wafer: sweep needs at least one {name}, got none")
    rows = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        named = {"subject": subject, **chosen, "grid": "{}x{}".format(*chosen["grid"])}
        if named.get("groups", "") is None:
            del named["groups"]
        try:
            report = make(**chosen)
        except ValueError as error:
            rows.append(named | dict.fromkeys(RESULTS, "") | {"error": str(error)})
            continue
        found = (
            round(report.cycles),
            round(report.seconds * 1e6, 3),
            round(report.tokens_per_second, 2),
            round(report.utilization, 5),
            report.peak_sram_bytes,
            report.fits,
        )
        rows.append(named | dict(zip(RESULTS, found, strict=True)) | {"error": ""})
    return rows


def as_csv(rows: list[dict]) -> str:
    """The rows with a header."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()

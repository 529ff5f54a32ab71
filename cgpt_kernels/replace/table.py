"""What a replacement did, one row per module; prints as text, or as a table through rich."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One module: its name in the model, its class, the class it got (None: left alone), why, and
    the bytes that packed copies of its own weights take."""

    name: str
    cls: str
    replaced_by: str | None
    reason: str = ""
    packed: int = 0

    @property
    def outcome(self) -> str:
        return self.replaced_by or "left alone"


_COLUMNS = ("module", "class", "outcome", "packed", "reason")


class Table(list[Row]):
    """A list of `Row`, in the order of the model's modules.

    Printed, the rows of repeated layers are one line: `h.*.attn (x12)`.
    """

    @property
    def replaced(self) -> list[Row]:
        return [row for row in self if row.replaced_by]

    @property
    def left_alone(self) -> list[Row]:
        return [row for row in self if not row.replaced_by]

    @property
    def packed(self) -> int:
        """Bytes that packed copies of weights take in all."""
        return sum(row.packed for row in self)

    def lines(self) -> list[tuple[str, str, str, str, str]]:
        """Printable rows (module pattern, class, outcome, packed, reason), layers of a list merged
        and their bytes added."""
        merged: dict[tuple[str, ...], list[int]] = {}
        for row in self:
            pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", row.name) or "(the model)"
            merged.setdefault((pattern, row.cls, row.outcome, row.reason), []).append(row.packed)
        lines = []
        for (pattern, cls, outcome, reason), packed in merged.items():
            name = f"{pattern} (x{len(packed)})" if len(packed) > 1 else pattern
            size = f"{sum(packed) / 1e6:.1f} MB" if sum(packed) else ""
            lines.append((name, cls, outcome, size, reason))
        return lines

    def __str__(self) -> str:
        lines = [_COLUMNS, *self.lines()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def __rich__(self):
        from rich.table import Table as RichTable

        table = RichTable(*_COLUMNS, caption=f"{len(self.replaced)} of {len(self)} replaced")
        for line in self.lines():
            table.add_row(*line, style=None if line[2] != "left alone" else "dim")
        return table

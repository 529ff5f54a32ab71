"""What a replacement did, one row per module; prints as text, or as a table through rich."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One module: its name in the model, its class, the class it got (None: left alone), why."""

    name: str
    cls: str
    replaced_by: str | None
    reason: str = ""

    @property
    def outcome(self) -> str:
        return self.replaced_by or "left alone"


_COLUMNS = ("module", "class", "outcome", "reason")


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

    def lines(self) -> list[tuple[str, str, str, str]]:
        """Printable rows (module pattern, class, outcome, reason), layers of a list merged."""
        count: dict[tuple[str, ...], int] = {}
        for row in self:
            pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", row.name) or "(the model)"
            key = (pattern, row.cls, row.outcome, row.reason)
            count[key] = count.get(key, 0) + 1
        return [(f"{key[0]} (x{n})" if n > 1 else key[0], *key[1:]) for key, n in count.items()]

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

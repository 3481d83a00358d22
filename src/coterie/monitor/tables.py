"""A table of results, and its four faces: rich for a terminal, plain text, Markdown, and JSON values.

Cells are data (numbers stay numbers until they are shown); text in them is untrusted and is shown as text, never as
markup and never with control characters.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len

if TYPE_CHECKING:
    from rich.table import Table

Cell = str | int | float | None
"""What a cell holds; None: nothing was measured."""

EMPTY = "-"

_MOVING = {
    "\u2028",
    "\u2029",
    "\u200e",
    "\u200f",
    "\u061c",
    *map(chr, range(0x202A, 0x202F)),
    *map(chr, range(0x2066, 0x206A)),
}


def clean(text: str, *, lines: bool = True) -> str:
    """`text` without anything that could move the cursor, change colours, or reorder what is read.

    Control characters, escape bytes, lone surrogates and bidirectional overrides are dropped; tabs become spaces.
    With `lines` newlines stay; without, they become spaces.
    """
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    if not lines:
        text = text.replace("\n", " ")
    return "".join(
        char
        for char in text
        if char == "\n" or (unicodedata.category(char) not in ("Cc", "Cs") and char not in _MOVING)
    )


@dataclass(frozen=True, slots=True)
class ResultTable:
    """Named columns and rows of numbers and names. Raises `ValueError` for a row of another width."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        for number, row in enumerate(self.rows, start=1):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: row {number} has {len(row)} cells for {len(self.columns)} columns"
                )

    def plain(self) -> str:
        """Aligned text, columns two spaces apart; wide (Chinese) characters are counted as two."""
        head, body = self._shown()
        widths = [max(cell_len(line[at]) for line in (head, *body)) for at in range(len(head))]
        right = self._numeric()
        lines = [clean(self.title, lines=False)] if self.title else []
        lines += [
            "  ".join(
                _pad(cell, width, to_right) for cell, width, to_right in zip(line, widths, right, strict=True)
            ).rstrip()
            for line in (head, ["-" * width for width in widths], *body)
        ]
        return "\n".join(lines)

    def rich(self) -> Table:
        """A `rich.table.Table`."""
        from rich.table import Table
        from rich.text import Text

        head, body = self._shown()
        table = Table(title=Text(clean(self.title, lines=False)) if self.title else None)
        for name, to_right in zip(head, self._numeric(), strict=True):
            table.add_column(Text(name), justify="right" if to_right else "left")
        for line in body:
            table.add_row(*(Text(cell) for cell in line))
        return table

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"title": self.title, "columns": list(self.columns), "rows": [list(row) for row in self.rows]}

    def _shown(self) -> tuple[list[str], list[list[str]]]:
        return [clean(name, lines=False) for name in self.columns], [[show(cell) for cell in row] for row in self.rows]

    def _numeric(self) -> list[bool]:
        return [
            any(isinstance(row[at], int | float) for row in self.rows)
            and not any(isinstance(row[at], str) for row in self.rows)
            for at in range(len(self.columns))
        ]


def show(cell: Cell) -> str:
    """A cell as text: floats with three decimals, None as "-"."""
    if cell is None:
        return EMPTY
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return clean(str(cell), lines=False)


def _pad(text: str, width: int, to_right: bool) -> str:
    gap = " " * (width - cell_len(text))
    return gap + text if to_right else text + gap

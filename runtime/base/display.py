"""Texts for people: sizes, aligned columns, text without terminal control characters."""

from __future__ import annotations

import re
from collections.abc import Sequence

# A model can write any character; those that control a terminal are not passed on to it.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Removes control characters from the text, except newline and tab."""
    return _CONTROL.sub("", text)


def size(count: float) -> str:
    """Writes a number of bytes in binary units: 96.2 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def aligned(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Writes each row as a line with aligned columns, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

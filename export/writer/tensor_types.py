"""Rows of the kernel table for tensor types."""

from __future__ import annotations

from typing import Any

from ...runtime.base.errors import UnsupportedModelError


def format_row(name: str) -> dict[str, Any]:
    """The row of a tensor type in the kernel table: name, id, block, bytes."""
    from ...runtime._core import formats

    for row in formats():
        if row["name"] == name:
            return row
    raise UnsupportedModelError(f"tensor type {name} is not supported")

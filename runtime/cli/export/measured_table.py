"""The table that compares two forms of a model: size, accuracy, errors and time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ....export.onnx.measurement import Measured

_HEAD = (
    "",
    "size",
    "accuracy",
    "rel. error",
    "max error",
    "max relative",
    "same top-1",
    "ms/sample",
)


def table(reference: Measured, candidate: Measured) -> list[str]:
    """Returns the table's lines; columns without any measurement are left out.

    max relative: the largest difference as a share of the reference's largest output.
    """
    rows = [_HEAD, _row(reference), _row(candidate)]
    used = [i for i in range(len(_HEAD)) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    lines = ["  ".join(row[i].rjust(widths[i]) for i in used) for row in rows]
    return [*lines, f"over {reference.samples} samples; ms: one sample at a time, this machine"]


def _row(m: Measured) -> tuple[str, ...]:
    from ...base.display import size

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        m.name,
        size(m.nbytes),
        shown(m.accuracy, ".2%"),
        shown(m.relative_error, ".3g"),
        shown(m.max_error, ".3g"),
        shown(m.max_relative, ".2g"),
        shown(m.agreement, ".2%"),
        shown(m.milliseconds, ".3f"),
    )

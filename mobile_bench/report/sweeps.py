"""Results of sweeps other than runs: perplexities, widths of experts, failed jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .quantities import BYTES, number, unit_of
from .setups import Read, at
from .tables import EMPTY, Cell, Row, Table


def sweep_tables(found: Read) -> list[Table]:
    """Tables of all results that are not runs."""
    tables = [
        _perplexity_table(found.perplexities),
        _width_table(found.widths),
        _failure_table(found.jobs),
    ]
    return [table for table in tables if table is not None]


def _name(result: dict[str, Any]) -> str:
    model = result.get("model")
    return str(model.get("name", "?") if isinstance(model, dict) else model)


def _cell(value: float | None, digits: int = 4) -> Cell:
    return EMPTY if value is None else Cell(number(value, digits=digits))


def _sizes(values: Sequence[float | None]) -> tuple[str, list[Cell]]:
    """The unit that suits all the sizes, and their cells."""
    unit = unit_of([v for v in values if v is not None], BYTES)
    return unit.name, [EMPTY if v is None else Cell(number(v, unit)) for v in values]


def _perplexity_table(found: Sequence[dict[str, Any]]) -> Table | None:
    if not found:
        return None
    texts = list(dict.fromkeys(str(one.get("text"))[:8] for one in found))
    unit, sizes = _sizes([at(one, "model", "nbytes") for one in found])
    rows = []
    for one, nbytes in zip(found, sizes, strict=True):
        error = at(one, "standard_error")
        value = _cell(at(one, "ppl"))
        if error is not None and value.text:
            value = Cell(value.text, f"\N{PLUS-MINUS SIGN}{number(error, digits=2)}")
        tokens, context = at(one, "tokens"), at(one, "context")
        cells = (
            nbytes,
            value,
            EMPTY if context is None else Cell(f"{context:,.0f}"),
            EMPTY if tokens is None else Cell(f"{tokens:,.0f}"),
        )
        group = f"text {str(one.get('text'))[:8]}" if len(texts) > 1 else ""
        rows.append(Row(group, _name(one), cells))
    rows.sort(key=lambda row: row.group)
    corner = ("text", "model") if len(texts) > 1 else ("model",)
    columns = (f"size, {unit}", "perplexity", "context", "tokens")
    note = "Beside a perplexity: its standard error."
    return Table("Perplexity", corner, columns, tuple(rows), (note,))


def _width_table(found: Sequence[dict[str, Any]]) -> Table | None:
    rows: dict[tuple[str, str, int], tuple[str, dict[str, Any]]] = {}
    for one in found:
        points = [one.get("source"), *(one.get("points") or []), one.get("made")]
        for point in points:
            if not isinstance(point, dict):
                continue
            kind = str(point.get("uniform") or "adapted")
            key = (_name(one), kind, int(at(point, "nbytes") or 0))
            rows.setdefault(key, (kind, point))
    if not rows:
        return None
    ordered = sorted(rows, key=lambda key: (key[0], key[2]))
    unit, sizes = _sizes([at(rows[key][1], "nbytes") for key in ordered])
    out = []
    for key, nbytes in zip(ordered, sizes, strict=True):
        kind, point = rows[key]
        cells = (_cell(at(point, "bits"), 3), nbytes, _kl(point), _cell(at(point, "ppl")))
        out.append(Row(key[0], kind, cells))
    columns = ("bits a weight", f"size, {unit}", "KL, nats", "perplexity")
    return Table("Widths of experts", ("model", "type"), columns, tuple(out))


def _kl(point: dict[str, Any]) -> Cell:
    value = at(point, "kl")
    return EMPTY if value is None else Cell(f"{value:.2g}")


def _failure_table(jobs: Sequence[dict[str, Any]]) -> Table | None:
    rows = []
    for one in jobs:
        if not one.get("error"):
            continue
        job = one.get("job")
        job = job if isinstance(job, dict) else {}
        parts = [str(job[key]) for key in ("kind", "type", "memory") if job.get(key)]
        cells = (Cell(str(one["error"])), Cell(", ".join(parts)))
        rows.append(Row("", str(job.get("model", "?")), cells))
    if not rows:
        return None
    return Table("Jobs that failed", ("model",), ("error", "job"), tuple(rows), words=True)

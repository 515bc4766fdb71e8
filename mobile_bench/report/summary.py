"""The results at a glance: a row for each model and budget, and devices side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .quantities import BYTES, ONE, RATE, SECONDS, Spread, Unit, budget, unit_of
from .setups import REFERENCE, Device, Measured, ModelResults, paired
from .tables import EMPTY, Cell, Row, Table, cell_of, mark_of, prompt_ratio, ratio_cell, speed_ratio

_Entry = tuple[str, ModelResults, Measured]


def usual_prompt(setups: Sequence[Measured]) -> int | None:
    """The prompt length that most setups have; of several the nearest to 512 tokens."""
    lengths = [n for one in setups for n in one.prompt_lengths]
    if not lengths:
        return None
    return min(set(lengths), key=lambda n: (-lengths.count(n), abs(n - 512), n))


def summary_table(devices: Sequence[Device]) -> Table | None:
    """The reference engine's results, and its speed as a multiple of the other engines'."""
    entries: list[_Entry] = [
        (
            f"{device.name} \N{MIDDLE DOT} {model.name}" if len(devices) > 1 else model.name,
            model,
            one,
        )
        for device in devices
        for model in device.models
        for one in model.measured
        if one.setup.engine == REFERENCE and one.runs
    ]
    if not entries:
        return None
    tokens = usual_prompt([one for _, _, one in entries])
    columns: list[tuple[str, list[Cell]]] = []

    def add(head: str, units: tuple[Unit, ...], value: Callable[[Measured], Spread | None]) -> None:
        found = [value(one) for _, _, one in entries]
        if any(found):
            unit = unit_of([v.median for v in found if v], units)
            columns.append((f"{head}, {unit.name}", [cell_of(v, unit) for v in found]))

    add("decode", RATE, lambda one: one.of_run("decode", "tok_s"))
    _add_ratios(columns, entries, None)
    if tokens is not None:
        add(f"TTFT {tokens:,}", SECONDS, lambda one: one.of_prompt(tokens, "ttft_s"))
        _add_ratios(columns, entries, tokens)
    add("read/token", BYTES, lambda one: one.of_run("decode", "bytes_token"))
    add("peak memory", BYTES, lambda one: one.of_run("peak_bytes"))
    rows = tuple(
        Row(
            group,
            ", ".join(filter(None, (budget(one.setup.room), one.extra))),
            tuple(cells[n] for _, cells in columns),
            mark=mark_of(one),
        )
        for n, (group, _, one) in enumerate(entries)
    )
    note: tuple[str, ...] = ()
    if any("\N{MULTIPLICATION SIGN}" in head for head, _ in columns):
        note = ("\N{MULTIPLICATION SIGN}: times as fast as that engine in the same memory.",)
    heads = tuple(head for head, _ in columns)
    return Table("stoker at a glance", ("model", "memory"), heads, rows, note)


def _add_ratios(
    columns: list[tuple[str, list[Cell]]], entries: Sequence[_Entry], tokens: int | None
) -> None:
    """Adds columns of ratios to each other engine: of decode, or of the TTFT at a length."""
    others = dict.fromkeys(other.engine for _, model, _ in entries for _, other in model.pairs())
    for engine in others:
        cells = []
        for _, model, one in entries:
            found = [o for ours, o in model.pairs() if ours is one and o.engine == engine]
            value = None
            if found and tokens is None:
                value = paired(one, found[0], speed_ratio)
            elif found and tokens is not None:
                value = paired(one, found[0], prompt_ratio(tokens))
            cells.append(ratio_cell(value))
        if any(cell.text for cell in cells):
            columns.append((f"\N{MULTIPLICATION SIGN} {engine}", cells))


_SPEED = ("decode", "tok_s")


def across_tables(devices: Sequence[Device]) -> list[Table]:
    """Devices side by side: decode and TTFT of setups that more than one device has run."""
    found: dict[tuple[str, int | None, str], dict[str, Measured]] = {}
    names: dict[str, str] = {}
    for device in devices:
        for model in device.models:
            names.setdefault(model.key, model.name)
            for one in model.measured:
                if one.runs:
                    key = (model.key, one.setup.room, one.label)
                    found.setdefault(key, {}).setdefault(device.id, one)
    shared = {key: by for key, by in found.items() if len(by) > 1}
    if not shared:
        return []
    shown = [device for device in devices if any(device.id in by for by in shared.values())]
    tokens = usual_prompt([one for by in shared.values() for one in by.values()])
    wanted: list[tuple[str, tuple[Unit, ...], Callable[[Measured], Spread | None]]] = [
        ("Decode, tok/s", RATE, lambda one: one.of_run(*_SPEED))
    ]
    if tokens is not None:
        caption = f"TTFT of {tokens:,} tokens"
        wanted.append((caption, SECONDS, lambda one: one.of_prompt(tokens, "ttft_s")))
    tables = [
        _across(caption, units, shared=shared, shown=shown, names=names, value=value)
        for caption, units, value in wanted
    ]
    return [table for table in tables if table.rows]


def _across(
    caption: str,
    units: tuple[Unit, ...],
    *,
    shared: dict[tuple[str, int | None, str], dict[str, Measured]],
    shown: Sequence[Device],
    names: dict[str, str],
    value: Callable[[Measured], Spread | None],
) -> Table:
    values = {
        key: [value(by[device.id]) if device.id in by else None for device in shown]
        for key, by in shared.items()
    }
    unit = ONE
    if len(units) > 1:
        unit = unit_of([v.median for row in values.values() for v in row if v], units)
        caption = f"{caption}, {unit.name}"
    rows = []
    # Rows of a model are kept together, whatever order the devices ran them in.
    for key in sorted(values, key=lambda key: list(names).index(key[0])):
        by = shared[key]
        if not any(values[key]):
            continue
        model_key, room, label = key
        rows.append(
            Row(
                names[model_key],
                f"{budget(room)} \N{MIDDLE DOT} {label}",
                tuple(cell_of(v, unit) if v else EMPTY for v in values[key]),
                next(iter(by.values())).setup.engine,
                "noisy" if any(one.noisy for one in by.values()) else "",
            )
        )
    heads = tuple(device.name for device in shown)
    return Table(caption, ("model", "configuration"), heads, tuple(rows))

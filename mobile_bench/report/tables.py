"""Tables of models' results, for a page and for Markdown alike."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .quantities import (
    BYTES,
    BYTES_S,
    JOULES,
    PERCENT,
    RATE,
    SECONDS,
    Spread,
    Unit,
    between,
    budget,
    number,
    unit_of,
)
from .setups import Measured, ModelResults, Output, agree, at, of_prompt, paired


@dataclass(frozen=True)
class Cell:
    """One value. heat: 0 to 100 if it is shaded.

    spread: the least and the greatest, or ""; tone: "better", "worse", "quiet" or "".
    """

    text: str
    spread: str = ""
    tone: str = ""
    heat: int | None = None


EMPTY = Cell("")
_COLUMN = 16  # most characters of a group's name that fit a column


@dataclass(frozen=True)
class Row:
    """A row: its head (or two heads, the first shared by a group), and its cells."""

    group: str
    head: str
    cells: tuple[Cell, ...]
    engine: str = ""  # whose colour is shown
    mark: str = ""  # shown beside the head: "noisy 2/3"


@dataclass(frozen=True)
class Table:
    """A table with a caption. corner: titles of the row heads, one or two."""

    caption: str
    corner: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    words: bool = False  # cells are words: flush left
    folded: bool = False  # long and of minor interest: shown closed

    @property
    def spans(self) -> bool:
        """True if a group's name is too long for a column: names then stand above their rows."""
        return len(self.corner) == 2 and any(len(row.group) > _COLUMN for row in self.rows)

    @property
    def spread_widths(self) -> list[int]:
        """[columns]: characters of the longest spread, so that the medians can be aligned."""
        columns = zip(*(row.cells for row in self.rows), strict=True)
        return [max(len(cell.spread) for cell in column) for column in columns]

    def groups(self) -> list[list[Row]]:
        """Lists of consecutive rows that belong to one group."""
        out: list[list[Row]] = []
        for row in self.rows:
            if out and row.group and out[-1][0].group == row.group:
                out[-1].append(row)
            else:
                out.append([row])
        return out


@dataclass(frozen=True)
class Column:
    """A quantity of setups. units: candidates; the chosen one is in the head.

    family: columns of one family share their unit.
    """

    head: str
    units: tuple[Unit, ...]
    value: Callable[[Measured], Spread | None]
    family: str = ""


def mark_of(one: Measured) -> str:
    """A warning about noisy repeats of a setup, or ""."""
    if not one.noisy:
        return ""
    return f"noisy {one.noisy}/{len(one.runs)}"


def setup_table(
    caption: str,
    setups: Sequence[Measured],
    columns: Iterable[Column],
    *,
    one_unit: bool = False,
) -> Table | None:
    """A table with a row for each setup, without rows and columns for which nothing was measured.

    one_unit: all columns have the same unit, which the caption then names.
    """
    found = [(column, [column.value(one) for one in setups]) for column in columns]
    found = [(column, values) for column, values in found if any(values)]
    rows = [n for n in range(len(setups)) if any(values[n] for _, values in found)]
    if not rows:
        return None
    heads, cells = [], []
    families: dict[str, list[float]] = {}
    for column, values in found:
        families.setdefault(column.family or column.head, []).extend(v.median for v in values if v)
    for column, values in found:
        unit = unit_of(families[column.family or column.head], column.units)
        if one_unit:
            heads.append(column.head)
        else:
            heads.append(f"{column.head}, {unit.name}" if unit.name else column.head)
        cells.append([cell_of(v, unit) for v in values])
    if one_unit:
        caption = f"{caption}, {unit.name}"
    return Table(
        caption,
        ("memory", "engine"),
        tuple(heads),
        tuple(
            Row(
                budget(setups[n].setup.room),
                setups[n].label,
                tuple(column[n] for column in cells),
                setups[n].setup.engine,
                mark_of(setups[n]),
            )
            for n in rows
        ),
    )


def cell_of(value: Spread | None, unit: Unit) -> Cell:
    """A cell with the median in the unit, and the spread."""
    if value is None:
        return EMPTY
    return Cell(number(value.median, unit), between(value, unit))


def decode_table(model: ModelResults) -> Table | None:
    """Decode of each setup: speed, share of the limit, latency of a token."""

    def of_limit(one: Measured) -> Spread | None:
        line = model.roofline(one.setup)
        speed, limit = one.of_run("decode", "tok_s"), at(line, "limit_s")
        if one.setup.engine != "stoker" or speed is None or not limit:
            return None
        return Spread((speed.median * limit,))

    def percentile(name: str) -> Callable[[Measured], Spread | None]:
        def value(one: Measured) -> Spread | None:
            found = one.of_run("decode", "token_ms", name)
            return found and Spread(tuple(v / 1e3 for v in found.values))

        return value

    columns = (
        Column("decode", RATE, lambda one: one.of_run("decode", "tok_s")),
        Column("of the limit", (PERCENT,), of_limit),
        Column("p50", SECONDS, percentile("p50"), "token"),
        Column("p95", SECONDS, percentile("p95"), "token"),
        Column("p99", SECONDS, percentile("p99"), "token"),
        Column("energy/token", JOULES, lambda one: one.of_run("energy", "joules_token")),
    )
    table = setup_table("Decode", model.measured, columns)
    return table and _with_tokens(table, model)


def _with_tokens(table: Table, model: ModelResults) -> Table:
    """The table with a column that gives equal letters to equal outputs, if there are outputs."""
    known: list[Output] = []
    texts = []
    shown = [one for one in model.measured if one.of_run("decode", "tok_s")]
    if len(shown) != len(table.rows):
        return table
    for one in shown:
        letters = []
        for output in one.outputs:
            same = next((n for n, old in enumerate(known) if agree(old, output)), len(known))
            if same == len(known):
                known.append(output)
            known[same] = max(known[same], output, key=len)
            letters.append(string.ascii_uppercase[same % 26])
        texts.append(", ".join(dict.fromkeys(letters)))
    if not known:
        return table
    rows = tuple(
        Row(row.group, row.head, (*row.cells, Cell(text)), row.engine, row.mark)
        for row, text in zip(table.rows, texts, strict=True)
    )
    note = "Same letter under output: the same tokens, as far as both have got."
    columns = (*table.columns, "output")
    return Table(table.caption, table.corner, columns, rows, (*table.notes, note))


def flash_table(model: ModelResults) -> Table | None:
    """Flash reads per decoded token: hit rate, bytes read, and where the time goes."""
    columns = (
        Column("hits", (PERCENT,), lambda one: one.of_run("decode", "hit_rate")),
        Column("read/token", BYTES, lambda one: one.of_run("decode", "bytes_token"), "read"),
        Column("an optimal cache", BYTES, lambda one: one.of_run("flash", "belady_bytes"), "read"),
        Column("flash", BYTES_S, lambda one: one.of_run("flash", "bytes_s")),
        Column("computing", SECONDS, lambda one: one.of_run("decode", "compute_s"), "time"),
        Column("waiting", SECONDS, lambda one: one.of_run("decode", "stall_s"), "time"),
    )
    return setup_table("Reads from flash, a token of decode", model.measured, columns)


def prompt_tables(model: ModelResults) -> list[Table]:
    """TTFT and prefill by prompt length."""
    lengths = sorted({n for one in model.measured for n in one.prompt_lengths})
    out = []
    for caption, key, units in (
        ("TTFT by prompt length in tokens", "ttft_s", SECONDS),
        ("Prefill by prompt length in tokens", "tok_s", RATE),
    ):
        columns = [Column(f"{n:,}", units, _of_prompt(n, key), "prompt") for n in lengths]
        table = setup_table(caption, model.measured, columns, one_unit=True)
        if table is not None:
            out.append(table)
    return out


def _of_prompt(tokens: int, key: str) -> Callable[[Measured], Spread | None]:
    return lambda one: one.of_prompt(tokens, key)


def memory_table(model: ModelResults) -> Table | None:
    """Peak memory and the time to load."""
    columns = (
        Column("peak, process", BYTES, lambda one: one.of_run("peak_bytes"), "peak"),
        Column("peak, cgroup", BYTES, lambda one: one.of_run("group_peak_bytes"), "peak"),
        Column("load, cold", SECONDS, lambda one: one.of_run("load_cold_s"), "load"),
        Column("load, warm", SECONDS, lambda one: one.of_run("load_warm_s"), "load"),
    )
    return setup_table("Memory and load", model.measured, columns)


def ratio_table(model: ModelResults) -> Table | None:
    """Ratios to each other engine, pair by pair within a repeat; above 1 is better."""
    pairs = list(model.pairs())
    lengths = sorted({n for ours, _ in pairs for n in ours.prompt_lengths})
    times = "\N{MULTIPLICATION SIGN}"
    ratios: list[tuple[str, Ratio]] = [("decode", speed_ratio)]
    ratios += [(f"TTFT {n:,}", prompt_ratio(n)) for n in lengths]
    ratios += [("cold load", _less("load_cold_s")), ("peak memory", _less("peak_bytes"))]
    found = [(ours, other, [paired(ours, other, r) for _, r in ratios]) for ours, other in pairs]
    found = [(ours, other, values) for ours, other, values in found if any(values)]
    used = [n for n in range(len(ratios)) if any(values[n] for _, _, values in found)]
    if not found:
        return None
    several = len({ours.label for ours, *_ in found}) > 1
    counts = [max(value.n for value in values if value) for _, _, values in found]
    same = len(set(counts)) == 1
    rows = []
    for (ours, other, values), n in zip(found, counts, strict=True):
        cells = [ratio_cell(values[k]) for k in used]
        rows.append(
            Row(
                budget(ours.setup.room),
                f"{ours.label} : {other.label}" if several else other.label,
                (*cells, *([] if same else [Cell(str(n), tone="quiet")])),
                other.setup.engine,
                "noisy" if ours.noisy or other.noisy else "",
            )
        )
    heads = [f"{ratios[n][0]}, {times}" for n in used] + ([] if same else ["pairs"])
    note = "Above 1 stoker is faster, or needs less; coloured where all of several pairs agree."
    if same:
        note += f" {counts[0]} pair{'' if counts[0] == 1 else 's'} each."
    caption = "stoker against other engines, pair by pair within a repeat"
    return Table(caption, ("memory", "against"), tuple(heads), tuple(rows), (note,))


_SPEED = ("decode", "tok_s")
Ratio = Callable[[dict[str, Any], dict[str, Any]], "float | None"]


def speed_ratio(a: dict[str, Any], b: dict[str, Any]) -> float | None:
    """Decode speed of the first of two runs as a multiple of the second's."""
    return over(at(a, *_SPEED), at(b, *_SPEED))


def _less(key: str) -> Ratio:
    return lambda a, b: over(at(b, key), at(a, key))


def prompt_ratio(tokens: int) -> Ratio:
    """Function that gives how many times as fast the first of two runs is in a prompt's TTFT."""
    return lambda a, b: over(of_prompt(b, tokens, "ttft_s"), of_prompt(a, tokens, "ttft_s"))


def over(a: float | None, b: float | None) -> float | None:
    """The quotient, None if it is undefined."""
    return a / b if a is not None and b else None


def ratio_cell(value: Spread | None) -> Cell:
    """A cell of a ratio, marked better or worse than 1 if all pairs agree on it."""
    if value is None:
        return EMPTY
    tone = "better" if value.low > 1 else "worse" if value.high < 1 else ""
    if value.n == 1:
        tone = ""
    return Cell(number(value.median), between(value), tone)


def remark_table(model: ModelResults) -> Table | None:
    """Table of what was left out, failed or was disturbed, and in which repeats."""
    rows = tuple(
        Row(
            budget(one.setup.room),
            one.label,
            (Cell(text), Cell(", ".join(str(n + 1) for n in repeats))),
            one.setup.engine,
        )
        for one in model.measured
        for text, repeats in one.remarks
    )
    if not rows:
        return None
    caption = "What was left out, failed or was disturbed"
    folded = len(rows) > 8
    columns = ("what", "repeats")
    return Table(caption, ("memory", "engine"), columns, rows, words=True, folded=folded)


def model_tables(model: ModelResults) -> list[Table]:
    """All tables of a model's results."""
    tables = [decode_table(model), ratio_table(model), flash_table(model)]
    tables += [*prompt_tables(model), memory_table(model), remark_table(model)]
    return [table for table in tables if table is not None]

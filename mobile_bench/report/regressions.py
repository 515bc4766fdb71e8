"""Regressions: quantities that changed since an earlier result on the same device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .quantities import BYTES, JOULES, RATE, SECONDS, Spread, Unit, between, budget, number, unit_of
from .setups import Device, Measured, agree
from .tables import EMPTY, Cell, Row, Table

Verdict = Literal["worse", "better", "same"]


@dataclass(frozen=True)
class Metric:
    """A quantity whose change counts. more: greater is better."""

    name: str
    units: tuple[Unit, ...]
    more: bool
    value: Callable[[Measured], Spread | None]


@dataclass(frozen=True)
class Comparison:
    """A quantity of a setup, now and earlier. change: relative, of the median."""

    device: str
    model: str
    room: int | None
    label: str
    engine: str
    metric: str
    units: tuple[Unit, ...]
    old: Spread | None
    new: Spread | None
    change: float | None
    verdict: Verdict
    note: str


@dataclass(frozen=True)
class Regressions:
    """All comparisons, and setups that only one side has. threshold: a share."""

    earlier: str
    threshold: float
    comparisons: tuple[Comparison, ...]
    only_now: tuple[str, ...]
    only_earlier: tuple[str, ...]

    def of(self, verdict: Verdict) -> list[Comparison]:
        """The comparisons with this verdict."""
        return [one for one in self.comparisons if one.verdict == verdict]

    @property
    def summary(self) -> str:
        """One line such as "2 worse, 1 better, 24 same"."""
        if not self.comparisons:
            return "nothing to compare: no device and configuration is in both"
        verdicts: tuple[Verdict, ...] = ("worse", "better", "same")
        counts = ", ".join(f"{len(self.of(one))} {one}" for one in verdicts)
        setups = {(c.device, c.model, c.room, c.label) for c in self.comparisons}
        return f"{counts} ({len(setups)} configurations)"

    @property
    def statistics(self) -> str:
        """Explanation of how the verdicts are reached."""
        return (
            "Compared are the same device, model, engine, memory, limit, threads, context and "
            "options. A quantity is worse or better when the medians of the repeats differ by more "
            f"than {self.threshold * 100:g} % of the earlier one and neither median lies between "
            "the least and the greatest repeat of the other side; otherwise it is the same. With "
            "three repeats a side chance alone sets the medians apart like this for one quantity "
            "in five, and with a single one always: then the threshold alone decides."
        )

    @property
    def failed(self) -> bool:
        """True if something is worse, or nothing could be compared."""
        return not self.comparisons or bool(self.of("worse"))


def metrics(old: Measured, new: Measured) -> list[Metric]:
    """The quantities that two measurements of a setup are compared by."""
    out = [
        Metric("decode", RATE, True, lambda one: one.of_run("decode", "tok_s")),
        Metric("token p99", SECONDS, False, _p99),
    ]
    for tokens in sorted({*old.prompt_lengths} & {*new.prompt_lengths}):
        out.append(Metric(f"TTFT {tokens:,}", SECONDS, False, _ttft(tokens)))
    out += [
        Metric("read/token", BYTES, False, lambda one: one.of_run("decode", "bytes_token")),
        Metric("peak memory", BYTES, False, lambda one: one.of_run("peak_bytes")),
        Metric("load, cold", SECONDS, False, lambda one: one.of_run("load_cold_s")),
        Metric("load, warm", SECONDS, False, lambda one: one.of_run("load_warm_s")),
        Metric("energy/token", JOULES, False, lambda one: one.of_run("energy", "joules_token")),
    ]
    return out


def _p99(one: Measured) -> Spread | None:
    found = one.of_run("decode", "token_ms", "p99")
    return found and Spread(tuple(v / 1e3 for v in found.values))


def _ttft(tokens: int) -> Callable[[Measured], Spread | None]:
    return lambda one: one.of_prompt(tokens, "ttft_s")


def verdict(old: Spread, new: Spread, *, more: bool, threshold: float) -> Verdict:
    """Whether the new median is worse or better.

    It is the same within the threshold (a share of the earlier median), and if either median lies
     between the least and the greatest of the other side. more: greater is better.
    """
    a, b = old.median, new.median
    if abs(b - a) <= threshold * abs(a):
        return "same"
    if old.low <= b <= old.high or new.low <= a <= new.high:
        return "same"
    return "better" if (b > a) == more else "worse"


def regressions(
    now: Sequence[Device], earlier: Sequence[Device], *, name: str, threshold: float
) -> Regressions:
    """Compares results with earlier ones; threshold: a share, 0.05 is 5%."""
    old, new = _setups(earlier), _setups(now)
    found = []
    for key, (device, model, one) in new.items():
        if key in old:
            found += _compared(device, model, old[key][2], one, threshold)
    return Regressions(
        name,
        threshold,
        tuple(found),
        tuple(_names(new[key] for key in new if key not in old)),
        tuple(_names(old[key] for key in old if key not in new)),
    )


_Found = tuple[str, str, Measured]


def _setups(devices: Iterable[Device]) -> dict[object, _Found]:
    """Setups by the key that identifies them; of several engine versions the latest run counts."""
    out: dict[object, _Found] = {}
    for device in devices:
        for model in device.models:
            for one in sorted(model.measured, key=_latest):
                out[one.setup] = (device.name, model.name, one)
    return out


def _latest(one: Measured) -> str:
    return max((str(run.get("time", "")) for run in (*one.runs, *one.failed)), default="")


def _names(found: Iterable[_Found]) -> Iterable[str]:
    for device, model, one in found:
        dot = " \N{MIDDLE DOT} "
        yield dot.join((device, model, budget(one.setup.room), one.label))


def _compared(
    device: str, model: str, old: Measured, new: Measured, threshold: float
) -> list[Comparison]:
    out = []
    where = (device, model, new.setup.room, new.label, new.setup.engine)
    if old.runs and not new.runs:
        error = str(new.failed[-1].get("error")) if new.failed else "no run"
        none = (None, None, None)
        return [Comparison(*where, "runs", RATE, *none, "worse", f"fails now: {error}")]
    if new.runs and not old.runs:
        none = (None, None, None)
        return [Comparison(*where, "runs", RATE, *none, "better", "failed earlier")]
    for metric in metrics(old, new):
        a, b = metric.value(old), metric.value(new)
        if a is None or b is None:
            continue
        found = verdict(a, b, more=metric.more, threshold=threshold)
        change = b.median / a.median - 1 if a.median else None
        notes = []
        if min(a.n, b.n) == 1:
            notes.append("one repeat: spread unknown")
        if old.noisy or new.noisy:
            notes.append("noisy")
        if new.failed:
            notes.append(f"{len(new.failed)} repeats failed")
        note = ", ".join(notes)
        out.append(
            Comparison(*where, metric.name, metric.units, a, b, change, found, note),
        )
    if out and any(not any(agree(a, b) for a in old.outputs) for b in new.outputs if old.outputs):
        first = out[0]
        note = ", ".join(filter(None, (first.note, "other tokens than earlier")))
        out[0] = Comparison(*where, first.metric, first.units, *_rest(first), note)
    return out


def _rest(one: Comparison) -> tuple[Spread | None, Spread | None, float | None, Verdict]:
    return one.old, one.new, one.change, one.verdict


def regression_table(
    comparisons: Sequence[Comparison], caption: str, *, devices: bool, folded: bool = False
) -> Table | None:
    """Comparisons as a table, largest change first. devices: whether to name the devices."""
    if not comparisons:
        return None
    most: dict[str, float] = {}
    for one in comparisons:
        where = _where(one, devices=devices)
        most[where] = max(most.get(where, 0.0), math.inf if one.change is None else abs(one.change))
    rows = []
    for one in sorted(comparisons, key=lambda c: -most[_where(c, devices=devices)]):
        tone = "" if one.verdict == "same" else one.verdict
        cells: list[Cell] = []
        if one.old is None or one.new is None:
            cells = [EMPTY, EMPTY, EMPTY]
        else:
            unit = unit_of([one.old.median, one.new.median], one.units)
            for value in (one.old, one.new):
                text = f"{number(value.median, unit)} {unit.name}"
                cells.append(Cell(text, between(value, unit)))
            cells.append(Cell(_percent(one.change), tone=tone))
        repeats = f"{one.old.n if one.old else 0}, {one.new.n if one.new else 0}"
        cells += [Cell(one.verdict, tone=tone), Cell(repeats, tone="quiet")]
        where = _where(one, devices=devices)
        rows.append(Row(where, one.metric, tuple(cells), mark=one.note))
    heads = ("earlier", "now", "change", "verdict", "repeats")
    return Table(caption, ("configuration", "quantity"), heads, tuple(rows), folded=folded)


def _where(one: Comparison, *, devices: bool) -> str:
    parts = (*([one.device] if devices else []), one.model, budget(one.room), one.label)
    return " \N{MIDDLE DOT} ".join(parts)


def _percent(change: float | None) -> str:
    if change is None:
        return "from 0"
    sign = "+" if change >= 0 else "\N{MINUS SIGN}"
    return f"{sign}{abs(change) * 100:.1f} %"

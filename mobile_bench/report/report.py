"""The report: everything that pages and Markdown show of files of results.

`build` reads and compares, `page.page` and `markdown.markdown` show, `as_json` is for machines.
The same files give the same report, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.base.errors import OptionError
from ..probe import noise
from .device import device_tables, facts, facts_table
from .quantities import BYTES, Spread, quantity
from .regressions import Comparison, Regressions, regression_table, regressions
from .setups import Device, Measured, ModelResults, Read, at, clean, devices, read
from .summary import across_tables, summary_table
from .sweeps import sweep_tables
from .tables import Table, model_tables

THRESHOLD = 0.05


@dataclass(frozen=True)
class ModelSection:
    """A model's part of the report."""

    anchor: str
    results: ModelResults
    facts: str
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class DeviceSection:
    """A device's part of the report. facts: (name, value)."""

    anchor: str
    device: Device
    models: tuple[ModelSection, ...]
    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Command:
    """A command that results came from, and what it measured with."""

    text: str
    detail: str


@dataclass(frozen=True)
class Report:
    """Contents of a report. lead: a few facts about the whole; remarks: what is missing or odd."""

    title: str
    lead: tuple[str, ...]
    remarks: tuple[str, ...]
    summary: Table | None
    across: tuple[Table, ...]
    sections: tuple[DeviceSection, ...]
    sweeps: tuple[Table, ...]
    commands: tuple[Command, ...]
    regressions: Regressions | None
    regression_tables: tuple[Table, ...]
    notes: tuple[str, ...]

    @property
    def devices(self) -> list[Device]:
        """The devices, in the order of the sections."""
        return [section.device for section in self.sections]


def build(
    results: Sequence[Path],
    *,
    against: Path | None = None,
    threshold: float = THRESHOLD,
    title: str = "stoker report",
) -> Report:
    """Reads results (JSON lines) and device profiles.

    against: earlier results to find regressions from; threshold: a share, the least change that
    counts. Raises OptionError for files that are neither, and if nothing is in them.
    """
    if not 0 <= threshold < 1:
        raise OptionError(f"threshold: expected 0 to 100 %, found {threshold * 100:g}")
    found = read(results)
    if not found:
        names = ", ".join(map(str, results))
        raise OptionError(f"{names}: no results: expected runs or a device profile in it")
    shown = devices(found)
    compared = None
    if against is not None:
        old = read([against])
        if not old.runs:
            raise OptionError(f"{against}: expected earlier runs to compare with, found none")
        compared = regressions(shown, devices(old), name=clean(against.name), threshold=threshold)
    sections = tuple(_section(device, n) for n, device in enumerate(shown, 1))
    across = list(across_tables(shown))
    side = facts_table(shown)
    if side is not None:
        across.insert(0, side)
    return Report(
        clean(title),
        _lead(shown, found),
        tuple(_remarks(shown)),
        summary_table(shown),
        tuple(across),
        sections,
        tuple(sweep_tables(found)),
        tuple(_commands(shown)),
        compared,
        _regression_tables(compared, several=len(shown) > 1),
        _notes(found.runs),
    )


def _section(device: Device, number: int) -> DeviceSection:
    profile = device.profile or {}
    models = tuple(
        ModelSection(f"d{number}-m{n}", one, _model_facts(one), tuple(model_tables(one)))
        for n, one in enumerate(device.models, 1)
    )
    known = tuple(facts(profile)) if profile else ()
    return DeviceSection(f"d{number}", device, models, known, tuple(device_tables(profile)))


def _model_facts(model: ModelResults) -> str:
    """A model's architecture, type, size, layers and experts, and the settings it ran with."""
    given = model.facts
    parts = [str(given[key]) for key in ("architecture", "type") if given.get(key)]
    nbytes = at(given, "nbytes")
    if nbytes:
        parts.append(quantity(nbytes, BYTES))
    if at(given, "n_layer"):
        parts.append(f"{given['n_layer']:g} layers")
    if at(given, "n_expert"):
        used = at(given, "n_expert_used")
        parts.append(f"{given['n_expert']:g} experts" + (f", {used:g} used" if used else ""))
    threads = sorted({one.setup.threads for one in model.measured})
    parts.append(f"{_listed(threads)} thread{'' if threads == [1] else 's'}")
    contexts = sorted({one.setup.context for one in model.measured if one.setup.context})
    if contexts:
        parts.append(f"context {_listed(contexts)}")
    repeats = sorted({len(one.runs) for one in model.measured if one.runs})
    if repeats:
        text = f"{repeats[0]}" if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
        parts.append(f"{text} repeat{'' if repeats == [1] else 's'}")
    versions = {f"{one.engine} {one.version}" for one in model.measured if one.version}
    parts += sorted(versions, key=lambda v: (not v.startswith("stoker"), v))
    return ", ".join(parts)


def _listed(values: Sequence[int]) -> str:
    texts = [f"{value:,}" for value in values]
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def _lead(shown: Sequence[Device], found: Read) -> tuple[str, ...]:
    runs = found.runs
    models = {model.key for device in shown for model in device.models}
    out = [_count(len(shown), "device")] if shown else []
    if models:
        out.append(_count(len(models), "model"))
    if runs:
        out.append(_count(len(runs), "run"))
    if found.jobs:
        out.append(_count(len(found.jobs), "job"))
    noisy = sum(one.noisy for device in shown for model in device.models for one in model.measured)
    if noisy:
        out.append(f"{noisy} of them noisy")
    failed = sum(bool(one.get("error")) for one in (*runs, *found.jobs))
    if failed:
        out.append(f"{failed} failed")
    timed = runs or found.jobs
    times = sorted(str(one["time"]) for one in timed if one.get("time"))
    if not times:
        times = sorted(str(d.profile["time"]) for d in shown if d.profile and d.profile.get("time"))
    if times:
        first, last = _minute(times[0]), _minute(times[-1])
        if first[:10] == last[:10]:
            last = last[11:]
        out.append(
            f"{_minute(times[0])} \N{EN DASH} {last} UTC"
            if first[-5:] != last[-5:]
            else f"{first} UTC"
        )
    return tuple(out)


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _remarks(shown: Sequence[Device]) -> list[str]:
    """Remarks on results that a reader would miss."""
    out = []
    for device in shown:
        prefix = f"{device.name}: " if len(shown) > 1 else ""
        if device.profile is None:
            out.append(f"{prefix}no device profile: stoker probe makes one.")
        if not device.models:
            out.append(f"{prefix}no runs: stoker bench MODEL measures.")
        for model in device.models:
            every = [run for one in model.measured for run in (*one.runs, *one.failed)]
            noisy = sum(one.noisy for one in model.measured)
            if noisy * 4 > len(every):
                out.append(
                    f"{prefix}{model.name}: {noisy} of {len(every)} runs were disturbed: "
                    "look at the spreads before the medians."
                )
            if not any(one.runs for one in model.measured):
                out.append(f"{prefix}{model.name}: every run failed.")
            elif not any(one.setup.room is not None for one in model.measured):
                continue  # dense, or not limited
            elif not any(model.roofline(one.setup) for one in model.measured):
                out.append(f"{prefix}{model.name}: no roofline was measured.")
    return out


def _commands(shown: Sequence[Device]) -> list[Command]:
    counts: dict[tuple[str, str], int] = {}
    for device in shown:
        for model in device.models:
            for one in model.measured:
                for run in (*one.runs, *one.failed):
                    key = (str(run.get("command") or "(not recorded)"), device.name)
                    counts[key] = counts.get(key, 0) + 1
    return [Command(text, f"{name}, {_count(n, 'run')}") for (text, name), n in counts.items()]


def _regression_tables(found: Regressions | None, *, several: bool) -> tuple[Table, ...]:
    if found is None:
        return ()
    changed = [one for one in found.comparisons if one.verdict != "same"]
    tables = (
        regression_table(changed, "What changed", devices=several),
        regression_table(found.of("same"), "What stayed the same", devices=several, folded=True),
    )
    return tuple(table for table in tables if table is not None)


def _notes(runs: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Notes on how the figures were measured."""
    out = []
    if runs:
        out += [
            "A value is the median of the repeats, beside it the least and the greatest of them; "
            "whiskers in plots are the same. Percentiles of a token are those within a repeat.",
            "Sizes are decimal (1 GB is 1,000 MB) unless they say GiB, MiB or KiB.",
            "TTFT is the time from giving the prompt, at an empty KV cache, to the token chosen "
            "after it. Decode is greedy, after a prompt of 64 tokens. Memory is what the process "
            "may take; read/token is what came from flash.",
            "The limit is the least time of a token: the larger of computing it, as measured with "
            "everything in memory, and reading what an optimal cache (Belady) would still miss at "
            "the flash's bandwidth.",
            f"A repeat is noisy when other processes used more than {noise.BUSY:.0%} of the "
            f"processors' time or the host took more than {noise.STEAL:.0%}, when the machine "
            f"throttled or ran below {noise.SLOW_CLOCK:.0%} of its clock, or when a reference "
            f"computation changed by more than {noise.REFERENCE:.0%}.",
        ]
    return tuple(out)


def as_json(report: Report) -> dict[str, Any]:
    """Medians of every setup and the verdicts of every comparison, for machines."""
    setups = [
        {
            "device": section.device.id,
            "model": model.results.name,
            "engine": one.setup.engine,
            "version": one.version,
            "threads": one.setup.threads,
            "memory": one.setup.memory,
            "limit": one.setup.limit,
            "options": one.setup.options,
            "repeats": len(one.runs),
            "failed": len(one.failed),
            "noisy": one.noisy,
            "decode_tok_s": _repeats(one.of_run("decode", "tok_s")),
            "ttft_s": {str(n): _repeats(one.of_prompt(n, "ttft_s")) for n in one.prompt_lengths},
            "bytes_token": _repeats(one.of_run("decode", "bytes_token")),
            "hit_rate": _repeats(one.of_run("decode", "hit_rate")),
            "peak_bytes": _repeats(one.of_run("peak_bytes")),
            "limit_tok_s": _limit(model.results, one),
        }
        for section in report.sections
        for model in section.models
        for one in model.results.measured
    ]
    out: dict[str, Any] = {"setups": setups}
    if report.regressions is not None:
        found = report.regressions
        out["against"] = {
            "earlier": found.earlier,
            "threshold": found.threshold,
            "comparisons": [_compared(one) for one in found.comparisons],
            "only_now": list(found.only_now),
            "only_earlier": list(found.only_earlier),
        }
    return out


def _limit(model: ModelResults, one: Measured) -> float | None:
    seconds = at(model.roofline(one.setup), "limit_s")
    return 1 / seconds if seconds else None


def _repeats(found: Spread | None) -> dict[str, float] | None:
    if found is None:
        return None
    return {"median": found.median, "low": found.low, "high": found.high, "n": found.n}


def _compared(one: Comparison) -> dict[str, Any]:
    return {
        "device": one.device,
        "model": one.model,
        "memory": one.room,
        "engine": one.label,
        "quantity": one.metric,
        "earlier": _repeats(one.old),
        "now": _repeats(one.new),
        "change": one.change,
        "verdict": one.verdict,
        "note": one.note,
    }

"""The report as Markdown: its tables and texts, without the plots."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .report import Report
from .tables import Cell, Row, Table

# Characters that would start markup in a line; names of models and devices are not trusted.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~!])")


def markdown(report: Report) -> str:
    """The whole report, with GitHub's tables."""
    out = [f"# {_plain(report.title)}", " \N{MIDDLE DOT} ".join(map(_plain, report.lead))]
    out += [f"- {_plain(remark)}" for remark in report.remarks]
    if report.regressions is not None:
        found = report.regressions
        out.append(f"## Against {_plain(found.earlier)}")
        out += [f"**{found.summary}**", _plain(found.statistics)]
        out += _tables(report.regression_tables)
        for text, names in (("Only now", found.only_now), ("Only earlier", found.only_earlier)):
            if names:
                out.append(f"{text}:\n\n" + "\n".join(f"- {_plain(name)}" for name in names))
    if report.summary is not None:
        out += ["## Summary", *_tables([report.summary])]
    if report.across:
        out += ["## Devices side by side", *_tables(report.across)]
    for section in report.sections:
        out.append(f"## {_plain(section.device.name)}")
        for model in section.models:
            out += [f"### {_plain(model.results.name)}", _plain(model.facts)]
            out += _tables(model.tables)
        if section.facts:
            out.append("### Device profile")
            out.append(
                "\n".join(f"- {_plain(what)}: {_plain(finding)}" for what, finding in section.facts)
            )
            out += _tables(section.tables)
    if report.sweeps:
        out += ["## Sweeps", *_tables(report.sweeps)]
    if report.commands:
        out.append("## Commands")
        for command in report.commands:
            out.append(f"{_plain(command.detail)}:")
            out.append("\n".join(f"    {line}" for line in command.text.splitlines() or [""]))
    if report.notes:
        out.append("## Notes")
        out.append("\n".join(f"- {_plain(note)}" for note in report.notes))
    return "\n\n".join(out) + "\n"


def _plain(text: str) -> str:
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def _tables(tables: Iterable[Table]) -> list[str]:
    out = []
    for table in tables:
        out.append(f"**{_plain(table.caption)}**")
        head = [*table.corner, *table.columns]
        sides = ["---"] * len(table.corner)
        sides += ["---" if table.words else "---:"] * len(table.columns)
        lines = [_line(map(_plain, head)), _line(sides)]
        lines += [_row(row, len(table.corner)) for row in table.rows]
        out.append("\n".join(lines))
        out += [_plain(note) for note in table.notes]
    return out


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _row(row: Row, heads: int) -> str:
    head = _plain(row.head)
    if row.mark:
        head += f" ({_plain(row.mark)})"
    first = [_plain(row.group), head] if heads == 2 else [head]
    return _line([*first, *(_cell(cell) for cell in row.cells)])


def _cell(cell: Cell) -> str:
    text = _plain(cell.text)
    if cell.tone in ("better", "worse"):
        text = f"**{text}**"
    return f"{text} ({_plain(cell.spread)})" if cell.spread else text

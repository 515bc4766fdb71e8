"""`stoker report`: writes results of measurements as one HTML page, Markdown or JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.errors import OptionError
from ..files.output_file import check_output
from ..terminal.options import Json

if TYPE_CHECKING:
    from ...mobile_bench.report.report import Report


def report(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULTS...", help="Results (.jsonl) and device profiles (.json)."),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The HTML page to write [default: report.html; none with --markdown alone].",
        ),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write Markdown, without the plots.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="OLD", help="Earlier results: say what is worse, better, the same."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(metavar="PERCENT", help="With --against: the least change that counts.")
    ] = 5.0,
    fail_on_regression: Annotated[
        bool,
        typer.Option(
            "--fail-on-regression",
            help="With --against: exit code 1 where something is worse or nothing is comparable.",
        ),
    ] = False,
    title: Annotated[str, typer.Option(help="The page's title.")] = "stoker report",
    as_json: Json = False,
) -> None:
    """Make a report of what stoker bench and stoker probe have measured.

    One page that needs nothing else: tables and plots of each device and model, of devices beside
    each other, and of changes since an earlier result on the same device.

    \b
    stoker report results.jsonl
    stoker report laptop.jsonl phone.jsonl board.json --out devices.html --markdown devices.md
    stoker report new.jsonl --against old.jsonl --fail-on-regression
    stoker report new.jsonl --against old.jsonl --threshold 10 --json
    """
    from ...mobile_bench.report import report as reports
    from ...mobile_bench.report.markdown import markdown as as_markdown

    if fail_on_regression and against is None:
        raise OptionError("--fail-on-regression needs --against OLD")
    if out is None and markdown is None and not as_json:
        out = Path("report.html")
    for file in (out, markdown):
        if file is not None:
            _check(file, [*results, *([against] if against else [])])
    if out is not None and markdown is not None and _same(out, markdown):
        raise OptionError(f"{out}: expected different files for the page and for Markdown")
    made = reports.build(results, against=against, threshold=threshold / 100, title=title)
    if out is not None:
        from ...mobile_bench.report.page import page

        _write(out, page(made))
    if markdown is not None:
        _write(markdown, as_markdown(made))
    if as_json:
        typer.echo(json.dumps(reports.as_json(made), indent=2))
    else:
        for line in _lines(made, [file for file in (out, markdown) if file is not None]):
            typer.echo(line)
    if fail_on_regression and made.regressions is not None and made.regressions.failed:
        raise typer.Exit(1)


def _same(a: Path, b: Path) -> bool:
    return a.absolute() == b.absolute() or (a.exists() and b.exists() and a.samefile(b))


def _check(file: Path, inputs: list[Path]) -> None:
    """Refuses output files that are also inputs, and those in missing folders."""
    if any(_same(file, read) for read in inputs):
        raise OptionError(f"{file}: expected another file than the results that are read")
    check_output(file)


def _write(file: Path, text: str) -> None:
    """Writes the file, which appears whole or not at all."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _lines(made: Report, written: list[Path]) -> list[str]:
    """Returns lines for display about the findings and the written files."""
    from ...mobile_bench.report.quantities import budget
    from ..base.display import printable

    lines = [f"{file}: {', '.join(made.lead)}" for file in written]
    lines += list(made.remarks)
    found = made.regressions
    if found is not None:
        lines.append(f"against {found.earlier}: {found.summary}")
        for one in found.of("worse"):
            where = [one.model, budget(one.room), one.label, one.metric]
            change = "" if one.change is None else f"{one.change * 100:+.1f} %"
            lines.append(f"  worse: {', '.join(where)} {change or one.note}")
    return [printable(line) for line in lines]

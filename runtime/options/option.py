"""A row of an option table: a dataclass's field that knows its check, its help and its flag.

`GenerationOptions` and `LoadOptions` are these tables. They define what the API checks, the command
line's options, the options of the core's sampler and engine, and README's table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

_KEY = "option"


@dataclass(frozen=True)
class Option:
    """The properties of a field besides its name, type and default.

    check: (name, value) -> the plain value; raises OptionError. It is not called with None where
        that is the default.
    help: one line of help. long: further text for the class's docstring.
    flags: command-line flags besides --name, shortest last; None: no flag at all. metavar, panel:
        those of the command line's help. default_text: the help's text for a default of None.
    sampler: what the sampling stages read by this name: "number", "tokens" (those whose text has
        one of these strings in it), "" nothing. only_with: the option that must be set for this
        one to have any effect; without it this one is left out.
    """

    check: Callable[[str, Any], Any]
    help: str
    long: str = ""
    flags: tuple[str, ...] | None = ()
    metavar: str | None = None
    panel: str | None = None
    default_text: str | None = None
    sampler: str = ""
    only_with: str = ""


def option(default: Any, check: Callable[[str, Any], Any], help: str, **more: Any) -> Any:
    """Makes a field of an option table; more: fields of Option."""
    row = {_KEY: Option(check, help, **more)}
    if isinstance(default, Mapping):
        return field(default_factory=lambda: default, hash=False, metadata=row)
    return field(default=default, metadata=row)


def rows(table: Any) -> Iterator[tuple[Field[Any], Option]]:
    """Yields the fields of a table (the class, or an instance) in order."""
    for row in fields(table):
        yield row, row.metadata[_KEY]


def default_of(row: Field[Any]) -> Any:
    """Returns a field's default."""
    return row.default if row.default_factory is MISSING else row.default_factory()


def check_all(options: Any) -> None:
    """Checks a frozen table's values and replaces them by plain ones. Raises OptionError."""
    for row, about in rows(options):
        value = getattr(options, row.name)
        if value is not None or default_of(row) is not None:
            object.__setattr__(options, row.name, about.check(row.name, value))


def documented(table: type) -> type:
    """Writes the rows into a class's docstring, one line each."""
    lines = [
        f"    {row.name}: {about.help}{' ' + about.long if about.long else ''}"
        for row, about in rows(table)
    ]
    table.__doc__ = f"{(table.__doc__ or '').rstrip()}\n\n" + "\n".join(lines) + "\n"
    return table


def as_markdown(table: type) -> str:
    """Returns the rows as README's table."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for row, about in rows(table):
        default = default_of(row)
        shown = about.default_text or ("none" if default in (None, (), {}) else f"{default}")
        text = f"{about.help} {about.long}".strip().removesuffix(".").replace("|", "\\|")
        lines.append(f"| {row.name} | {shown} | {text} |")
    return "\n".join(lines)

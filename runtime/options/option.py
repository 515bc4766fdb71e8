"""A row of an option table: a dataclass's field that knows its check, its help and its flag.

`GenerationOptions` and `LoadOptions` are these tables. What the API checks, the command line's
options, what the core's sampler and engine are given and README's table come from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

_KEY = "option"


@dataclass(frozen=True)
class Option:
    """What a field is, besides its name, type and default.

    check: (name, value) -> the plain value; raises OptionError. Not asked about None where that is
        the default.
    help: one line for people. long: what more there is to say, in the class's docstring.
    flags: of the command line besides --name, shortest last; None: not there. metavar, panel: of
        its help. default_text: what it says of a default that is None.
    sampler: what the sampling stages read by this name: "number", "tokens" (those whose text has
        one of these strings in it), "" nothing. only_with: the option without which that is of no
        use, and is left out.
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
    """A field of an option table; more: fields of Option."""
    row = {_KEY: Option(check, help, **more)}
    if isinstance(default, Mapping):
        return field(default_factory=lambda: default, hash=False, metadata=row)
    return field(default=default, metadata=row)


def rows(table: Any) -> Iterator[tuple[Field[Any], Option]]:
    """The fields of a table (the class, or an instance) in order."""
    for row in fields(table):
        yield row, row.metadata[_KEY]


def default_of(row: Field[Any]) -> Any:
    """A field's default."""
    return row.default if row.default_factory is MISSING else row.default_factory()


def check_all(options: Any) -> None:
    """Puts plain values in place of those that a frozen table was given. Raises OptionError."""
    for row, about in rows(options):
        value = getattr(options, row.name)
        if value is not None or default_of(row) is not None:
            object.__setattr__(options, row.name, about.check(row.name, value))


def documented(table: type) -> type:
    """Writes the rows into a class's docstring, one paragraph a row."""
    lines = [
        f"    {row.name}: {about.help}{' ' + about.long if about.long else ''}"
        for row, about in rows(table)
    ]
    table.__doc__ = f"{(table.__doc__ or '').rstrip()}\n\n" + "\n".join(lines) + "\n"
    return table


def as_markdown(table: type) -> str:
    """The rows as README's table."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for row, about in rows(table):
        default = default_of(row)
        shown = about.default_text or ("none" if default in (None, (), {}) else f"{default}")
        text = f"{about.help} {about.long}".strip().removesuffix(".").replace("|", "\\|")
        lines.append(f"| {row.name} | {shown} | {text} |")
    return "\n".join(lines)

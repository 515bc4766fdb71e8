"""Options that several commands share, in groups, and the further sections of their help.

A command takes the rows of an option table (runtime/options) as its own options:

    @with_tables
    def chat(model: Model, *, loading: LoadOptions = take(LoadOptions), ...) -> None:
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..base.errors import OptionError
from ..options.option import Option, default_of, rows

_FLASH = "Memory and experts on flash"  # the same panel as in options/load.py

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="GGUF file, name of the catalogue (smollm2), or hf:owner/name/file.gguf.",
    ),
]
System = Annotated[str | None, typer.Option("--system", "-s", help="The system message.")]
TemplateVar = Annotated[
    list[str] | None,
    typer.Option(
        "--template-var",
        metavar="NAME=VALUE",
        help="Variable of the chat template; VALUE is JSON, or else text; repeatable.",
    ),
]
ParseSpecial = Annotated[
    bool,
    typer.Option(
        "--parse-special",
        help="Read <|name|> in messages as the control token it names, not as plain text.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Memory = Annotated[
    str,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Budget of the whole process: 500MB, 2GiB, 60% of what the machine can give, or auto: "
        "everything in memory where it fits, else what the machine can give.",
        rich_help_panel=_FLASH,
    ),
]
Plan = Annotated[
    bool,
    typer.Option(
        "--plan",
        help="First print where the memory goes and the speed to expect.",
        rich_help_panel=_FLASH,
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Record which experts are used (.csv, .csv.gz), for stoker simulate.",
        rich_help_panel=_FLASH,
    ),
]


@dataclass(frozen=True)
class _Taken:
    table: type
    names: frozenset[str]


def take(table: type, *, only: Collection[str] = (), without: Collection[str] = ()) -> Any:
    """Returns the default of a parameter that stands for rows of a table.

    These are all rows with flags, or those in `only`, less those in `without`. The command gets one
    object of the table; the other rows have their defaults.
    """
    names = [row.name for row, about in rows(table) if about.flags is not None]
    chosen = [name for name in names if (name in only or not only) and name not in without]
    return _Taken(table, frozenset(chosen))


def with_tables(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces each parameter of a command that `take`s a table by one option a row."""
    signature = inspect.signature(command)
    hints = typing.get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    taken: dict[str, _Taken] = {}
    for parameter in signature.parameters.values():
        if isinstance(parameter.default, _Taken):
            taken[parameter.name] = parameter.default
            parameters += _parameters(parameter.default)
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, what in taken.items():
            values[name] = what.table(**_given(what, values))
        command(**values)

    annotations = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = annotations | {"return": None}
    return run


def _given(what: _Taken, values: dict[str, Any]) -> dict[str, Any]:
    """Takes the rows of a table out of a command's values."""
    given = {name: values.pop(name) for name in what.names}
    # An option that was not given is None, and the table's default applies.
    return {k: v for k, v in given.items() if v is not None} | {
        k: tuple(v) for k, v in given.items() if isinstance(v, list)
    }


def _parameters(what: _Taken) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(what.table)
    found = []
    for row, about in rows(what.table):
        if row.name not in what.names:
            continue
        kind = _kind(hints[row.name])
        default = default_of(row)
        found.append(
            inspect.Parameter(
                row.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if default == () else default,
                annotation=Annotated[kind, _option(row.name, kind, about)],
            )
        )
    return found


def _kind(hint: Any) -> Any:
    """Returns the command line's type for a field's type; of a union the one that takes text."""
    if typing.get_origin(hint) is tuple:
        return list[str] | None
    parts = typing.get_args(hint)
    if not parts or typing.get_origin(hint) is Mapping:
        return hint
    optional = type(None) in parts
    if any(typing.get_origin(part) is os.PathLike or part is os.PathLike for part in parts):
        kind: Any = Path
    else:
        kind = str if str in parts else next(part for part in parts if part is not type(None))
    return kind | None if optional else kind


def _option(name: str, kind: Any, about: Option) -> Any:
    """Returns the typer option of a row."""
    text = about.help
    if about.default_text is not None:
        text = f"{text.removesuffix('.')} [default: {about.default_text}]."
    flags = () if kind is bool else (f"--{name.replace('_', '-')}", *(about.flags or ()))
    return typer.Option(*flags, metavar=about.metavar, help=text, rich_help_panel=about.panel)


def template_variables(given: list[str] | None) -> dict[str, Any] | None:
    """Returns the values of --template-var by name, None if none is given. Raises OptionError."""
    if not given:
        return None
    variables: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise OptionError(f"--template-var: expected NAME=VALUE, found {text!r:.60}")
        try:
            variables[name.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            variables[name.strip()] = value
    return variables


class ModelCommand(TyperCommand):
    """A command that loads a model; its help has groups of options, then the names they take."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the arguments, then the options of each group."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            row = param.get_help_record(ctx)
            if row is not None:
                kind = "Arguments" if param.param_type_name == "argument" else "Options"
                group = getattr(param, "rich_help_panel", None) or kind
                groups.setdefault(group, []).append(row)
        for group, listed in groups.items():
            if listed:
                with formatter.section(group):
                    formatter.write_dl(listed)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Writes the policies, predictors and backends of this build."""
        from .._core import io_backends, policies, predictors

        for title, names in (
            ("Policies", policies()),
            ("Predictors", predictors()),
            ("I/O backends", [("auto", "the one that measures faster"), *io_backends()]),
        ):
            with formatter.section(title):
                formatter.write_dl(names)

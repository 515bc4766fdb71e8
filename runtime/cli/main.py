"""The `stoker` command, which imports large modules inside the commands, so that help is quick.

Exit codes: 0 done; 1 failed while running; 2 bad usage, option or model file; 130 Ctrl-C.
Errors are one line on stderr; STOKER_DEBUG=1 adds the traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..base.errors import (
    BudgetError,
    ChatTemplateError,
    ContextLengthError,
    ModelFileError,
    OptionError,
    StokerError,
    TokenizerError,
    UnsupportedModelError,
)
from ..terminal.options import ModelCommand
from ..terminal.spare_threads import spare_threads
from ..terminal.standard_streams import abandon_output, open_closed_streams

# This table lists all commands in the order of the help: name -> the module of this package that
# defines it, as a function of the module's name or (export) as an app of its own.
COMMANDS = {
    "run": "run",
    "chat": "chat",
    "batch": "batch",
    "inspect": "inspect",
    "pull": "pull",
    "perplexity": "perplexity",
    "profile": "profile",
    "bench": "bench",
    "bench-kernels": "bench_kernels",
    "plan": "plan",
    "probe": "probe",
    "report": "report",
    "sweep": "sweep",
    "simulate": "simulate",
    "doctor": "doctor",
    "export": "export.main",
}
# These commands show their options in groups.
_OF_MODELS = ("run", "chat", "batch", "perplexity")

_BAD_INPUT = (
    BudgetError,
    ChatTemplateError,
    ContextLengthError,
    ModelFileError,
    OptionError,
    TokenizerError,
    UnsupportedModelError,
)

_STYLE: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 96},
}


def _module_of(name: str) -> Any:
    return import_module(f".{COMMANDS[name]}", __package__)


@cache
def command_of(name: str) -> Any:
    """Imports the module of a command and returns the command."""
    module = _module_of(name)
    if hasattr(module, "app"):
        found = typer.main.get_command(module.app)
    else:
        alone = typer.Typer(**_STYLE)
        kind = ModelCommand if name in _OF_MODELS else None
        alone.command(name, cls=kind)(getattr(module, COMMANDS[name]))
        found = typer.main.get_command(alone)
    found.name = name
    return found


def _summary_of(name: str, width: int) -> str:
    """Returns a command's summary for the help of all commands, without reading its options."""
    module = _module_of(name)
    said = module.root if hasattr(module, "app") else getattr(module, COMMANDS[name])
    return TyperCommand(name, help=said.__doc__).get_short_help_str(width)


class _LazyCommands(Mapping[str, Any]):
    """The commands, each imported at first use, so that one does not take the memory of others."""

    def __getitem__(self, name: str) -> Any:
        if name not in COMMANDS:
            raise KeyError(name)
        return command_of(name)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Commands(TyperGroup):
    """The group of commands behind `stoker`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = _LazyCommands()

    def list_commands(self, ctx: Any) -> list[str]:
        """Returns the commands' names in the order of the help."""
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the help's list of commands."""
        width = formatter.width - 6 - max(map(len, COMMANDS))
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary_of(name, width)) for name in COMMANDS])


app = typer.Typer(name="stoker", cls=Commands, **_STYLE)


def _version(show: bool) -> None:
    if show:
        from ... import __version__

        typer.echo(f"stoker {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run language models from GGUF files on the CPU.

    \b
    stoker run smollm2 "What is gravity?"
    stoker chat smollm2
    stoker inspect model.gguf
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    open_closed_streams()
    spare_threads()
    try:
        code = _main(arguments)
        if code == 0:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has closed our output
        abandon_output()
        return 1
    except OSError as error:  # writing the output failed, for example on a full disk
        abandon_output()
        print(f"stoker: error: standard output: {error.strerror or error}", file=sys.stderr)
        return 1


def _main(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        # A model's text must not fail on a terminal that is not UTF-8.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    command = typer.main.get_command(app)
    try:
        given = sys.argv[1:] if arguments is None else list(arguments)
        code = command.main(
            args=[_encodable(argument) for argument in given],
            prog_name="stoker",
            standalone_mode=False,
        )
        return code if isinstance(code, int) else 0
    except typer.Abort:  # typer turns KeyboardInterrupt into this
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("STOKER_DEBUG", "0") not in ("", "0"):
            import traceback

            traceback.print_exc()
        message, code = _describe(error)
        print(f"stoker: error: {' '.join(message.split())}", file=sys.stderr)
        return code


def _encodable(argument: str) -> str:
    """Returns an argument that can be a file name. Raises OptionError for any other text."""
    try:
        if b"\0" not in os.fsencode(argument):
            return argument
    except UnicodeEncodeError:  # the argument contains half of a surrogate pair
        pass
    raise OptionError(f"expected text, found {argument!r}")


def _describe(error: Exception) -> tuple[str, int]:
    """Returns (message, exit code) of an exception."""
    if isinstance(error, StokerError):
        return str(error) or type(error).__name__, 2 if isinstance(error, _BAD_INPUT) else 1
    # Usage errors of typer have these attributes; their class differs between versions.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return f"{error.format_message()} (stoker --help shows the usage)", 2
    if isinstance(error, MemoryError):
        return "out of memory", 1
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", 1
    return f"internal error: {type(error).__name__}: {error} (STOKER_DEBUG=1 shows where)", 1


if __name__ == "__main__":
    sys.exit(main())

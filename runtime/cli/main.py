"""The `stoker` command. Everything heavy is imported inside the commands, so that help is quick.

Exit codes: 0 done; 1 failed while running; 2 bad usage, option or model file; 130 Ctrl-C.
Errors are one line on stderr; STOKER_DEBUG=1 adds the traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

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
from .bench import bench
from .bench_kernels import bench_kernels
from .chat import chat
from .doctor import doctor
from .export import main as export_command
from .inspect import inspect
from .perplexity import perplexity
from .plan import plan
from .probe import probe
from .profile import profile
from .pull import pull
from .report import report
from .run import run
from .simulate import simulate
from .sweep import sweep

_BAD_INPUT = (
    BudgetError,
    ChatTemplateError,
    ContextLengthError,
    ModelFileError,
    OptionError,
    TokenizerError,
    UnsupportedModelError,
)

app = typer.Typer(
    name="stoker",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
)

app.add_typer(export_command.app)


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


# In the order of the help.
app.command(cls=ModelCommand)(run)
app.command(cls=ModelCommand)(chat)
app.command()(inspect)
app.command()(pull)
app.command(cls=ModelCommand)(perplexity)
app.command()(profile)
app.command()(bench)
app.command("bench-kernels")(bench_kernels)
app.command()(plan)
app.command()(probe)
app.command()(report)
app.command()(sweep)
app.command()(simulate)
app.command()(doctor)


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
    except BrokenPipeError:  # the reader of our output has left
        abandon_output()
        return 1
    except OSError as error:  # the disk that it goes to is full, say
        abandon_output()
        print(f"stoker: error: standard output: {error.strerror or error}", file=sys.stderr)
        return 1


def _main(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        # Text of a model must not fail on a terminal that is not UTF-8.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    command = typer.main.get_command(app)
    try:
        code = command.main(
            args=None if arguments is None else list(arguments),
            prog_name="stoker",
            standalone_mode=False,
        )
        return code if isinstance(code, int) else 0
    except typer.Abort:  # what a KeyboardInterrupt becomes in there
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


def _describe(error: Exception) -> tuple[str, int]:
    """(message, exit code) of an exception."""
    if isinstance(error, StokerError):
        return str(error) or type(error).__name__, 2 if isinstance(error, _BAD_INPUT) else 1
    # Usage errors of typer (their class differs between its versions).
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

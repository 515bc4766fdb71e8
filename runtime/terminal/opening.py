"""Opens what commands read: models by file or name, texts, prompts, recordings."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import OptionError
from ..files.whole_file import MOST_TEXT, read_stdin, read_whole
from .terminal import byte_progress

if TYPE_CHECKING:
    from ..model import Model
    from ..options import LoadOptions


def open_named(
    spec: str,
    options: LoadOptions | None = None,
    *,
    plan: bool = False,
    as_json: bool = False,
    measure: bool = False,
) -> Model:
    """Loads the model that `spec` names, downloading it with a progress display if needed.

    plan: print the plan, as JSON on stdout or as a table on stderr. measure: measure the memory
    bandwidth, so that statistics can name the limit. Raises BudgetError and what a load raises.
    """
    from ..load import open_model

    model = open_model(find(spec), options)
    if plan or measure:
        report = model.forecast()
        if plan and as_json:
            print(json.dumps({"plan": report.as_dict()}), flush=True)
        elif plan:
            print("\n".join(report.lines()), end="\n\n", file=sys.stderr, flush=True)
    return model


def recording(model: Model, path: Path | None) -> AbstractContextManager[None]:
    """Records the routing into `path` unless it is None."""
    return nullcontext() if path is None else model.record(path)


def find(spec: str) -> Path:
    """Returns the file that `spec` names, downloaded with a progress display if needed."""
    from ...models.locate import locate

    with byte_progress() as progress:
        return locate(spec, download=True, progress=progress, waiting=_waiting)


def fetch(spec: str) -> Path:
    """Downloads a catalogue model or hf: file with a progress display."""
    from ...models.locate import fetch

    with byte_progress() as progress:
        return fetch(spec, progress=progress, waiting=_waiting)


def _waiting() -> None:
    print("waiting for another download of this model to finish", file=sys.stderr)


def read_text(path: Path) -> str:
    """Reads the text of a file, or of stdin for "-". Raises OptionError."""
    try:
        data = read_stdin() if str(path) == "-" else read_whole(path, MOST_TEXT)
        return data.decode("utf-8")
    except OSError as error:
        raise OptionError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        if not isinstance(error, UnicodeDecodeError):  # the path contains a NUL
            raise OptionError(f"cannot read {path}: {error}") from None
        raise OptionError(f"{path}: expected UTF-8 text, found byte {error.start} not to be") from (
            error
        )


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Returns the prompt of the argument, "-" (stdin) or a file; only one may be given."""
    if prompt is not None and file is not None:
        raise OptionError("give a prompt or --file, not both")
    if prompt is None and file is None:
        text = "" if sys.stdin.isatty() else read_text(Path("-"))
        if not text:  # stdin is a terminal or empty, so there is no prompt
            raise OptionError("give a prompt, - for stdin, or --file")
    elif prompt is not None and prompt != "-":
        return prompt
    else:
        text = read_text(file or Path("-"))
    return text.removesuffix("\n").removesuffix("\r")

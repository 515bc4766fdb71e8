"""`stoker batch`: many prompts from a file, in forward passes that they share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from ..base.display import printable
from ..base.errors import OptionError
from ..files.json_text import parse
from ..options import GenerationOptions, LoadOptions
from ..terminal.options import Model, Plan, take, with_tables
from ..terminal.terminal import progress_bars

if TYPE_CHECKING:
    from ..answers import Answers
    from ..model import Model as LoadedModel

_KEYS = ("id", "prompt", "messages")


@with_tables
def batch(
    model: Model,
    prompts: Annotated[Path, typer.Argument(help="JSON lines; - reads stdin.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the answers go, JSON lines.")],
    parallel: Annotated[
        int, typer.Option(min=1, max=1024, help="Answers at once, where the memory holds so many.")
    ] = 16,
    answering: GenerationOptions = take(GenerationOptions),
    loading: LoadOptions = take(LoadOptions),
    plan: Plan = False,
) -> None:
    """Answer many prompts, several at once.

    A line of PROMPTS is {"prompt": TEXT}, which is continued, or {"messages": [...]}, which are
    answered in the chat format; with an "id" of its own, or the line's number. Each answer is a
    line of OUT as soon as it is complete. The same command goes on where an interrupted one ended.

    \b
    stoker batch smollm2 prompts.jsonl --out answers.jsonl --temperature 0 -n 200
    stoker batch mixture.gguf prompts.jsonl -o answers.jsonl --memory 1GiB --parallel 4
    """
    from ..terminal.opening import open_named

    asked = list(_asked(prompts))
    with _continued(out) as (file, done):
        left = [(key, prompt) for key, prompt in asked if key not in done]
        if left:
            loaded = open_named(model, loading, plan=plan, as_json=False)
            answers = loaded.generate_many(
                [prompt for _, prompt in left], parallel=parallel, options=answering
            )
            _write(loaded, answers, [key for key, _ in left], file, len(asked))
    print(f"{out}: {len(asked)} answers, {len(left)} of them now", file=sys.stderr)


def _asked(path: Path) -> Iterator[tuple[str, Any]]:
    """(id, prompt) of each line. OptionError for one that is none."""
    from ..terminal.opening import read_text

    seen = set()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            document = parse(line)
        except ValueError as error:
            raise OptionError(f"{where}: expected JSON: {printable(str(error))}") from None
        if not isinstance(document, dict) or ("prompt" in document) == ("messages" in document):
            raise OptionError(f'{where}: expected an object with "prompt" or "messages"')
        unknown = sorted(document.keys() - set(_KEYS))
        if unknown:
            raise OptionError(f"{where}: expected {', '.join(_KEYS)}, found {unknown[0]!r}")
        prompt = document.get("prompt", document.get("messages"))
        if not isinstance(prompt, str if "prompt" in document else list) or not prompt:
            raise OptionError(f"{where}: expected a text, or a list of messages, not empty")
        key = str(document.get("id", number))
        if key in seen:
            raise OptionError(f"{where}: the id {key!r} is that of an earlier line, too")
        seen.add(key)
        yield key, prompt


@contextmanager
def _continued(path: Path) -> Iterator[tuple[BinaryIO, set[str]]]:
    """The file of answers, open at its end, and the ids of those it holds.

    What an interruption has left of a line is cut off. OptionError for a file of something else.
    """
    try:
        file = open(path, "r+b" if path.exists() else "x+b")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise OptionError(f"{path}: cannot be written: {error.strerror}") from None
    with file:
        done: set[str] = set()
        end = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                document = parse(line)
                done.add(str(document["id"]))
                assert isinstance(document["text"], str)
            except (ValueError, KeyError, TypeError, AssertionError):
                raise OptionError(
                    f"{path}: line {number} is no answer: name a file that `stoker batch` wrote, "
                    "or a new one"
                ) from None
            end += len(line)
        file.seek(end)
        file.truncate()
        yield file, done


def _write(
    model: LoadedModel, answers: Answers, keys: list[str], file: BinaryIO, total: int
) -> None:
    """Writes each answer as it ends; a bar on stderr in a terminal."""
    bars = progress_bars() if sys.stderr.isatty() else None
    task = None
    if bars is not None:
        bars.start()
        task = bars.add_task("answers", total=total, completed=total - len(keys))
    try:
        with answers:
            for index in answers.ended():
                generation = answers.generations[index]
                assert generation is not None
                document = {
                    "id": keys[index],
                    "text": generation.text,
                    "finish_reason": generation.finish_reason,
                    "stop_string": generation.stop_string,
                    "seed": generation.seed,
                    "model": model.path.name,
                    "stats": generation.stats.as_dict(),
                }
                file.write(json.dumps(document).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                if bars is not None and task is not None:
                    bars.update(task, advance=1)
    finally:
        if bars is not None:
            bars.stop()

"""`stoker profile`: teaches the predictors a model, and shows what they will find."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command_options import Context, Json, Memory, Model, Threads
from .errors import OptionError
from .output_file import check_output

if TYPE_CHECKING:
    from ..offload.profile import Profile

_MOST_TOKENS = 1 << 20


def profile(
    model: Model,
    *,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to run the model on [default: it writes it itself]."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile to make.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Tokens of the text.")] = 4096,
    predictor: Annotated[
        str, typer.Option(help="Predictors to teach: all, or linear, path, transition.")
    ] = "all",
    force: Annotated[bool, typer.Option("--force", help="Replace the profile there is.")] = False,
    threads: Threads = None,
    context: Context = None,
    memory: Memory = "auto",
    as_json: Json = False,
) -> None:
    """Teach predictors which experts of a mixture come next.

    Runs the model over a text and fits what foresees the next layers' experts, so that fewer of
    them are waited for. Shows the share of experts that each predictor finds on the last eighth of
    the text, which it has not learnt from. Use it with --predictor linear --profile FILE.

    \b
    stoker profile mixture.gguf --out mixture.profile
    stoker profile mixture.gguf --text my_corpus.txt --tokens 8192 --out mixture.profile
    stoker profile mixture.gguf --memory 4GiB --predictor linear --out mixture.profile
    stoker run mixture.gguf "Hello" --memory 1GiB --predictor linear --profile mixture.profile
    """
    from ..offload.profile import PREDICTORS, check_predictors, make_profile
    from .options import LoadOptions
    from .run_command import open_model, read_text
    from .terminal import stage_progress

    names = PREDICTORS if predictor == "all" else tuple(predictor.split(","))
    check_predictors(names)
    if not 256 <= tokens <= _MOST_TOKENS:
        raise OptionError(f"tokens: expected 256 to {_MOST_TOKENS}, found {tokens}")
    check_output(out, force=force)
    corpus = None if text is None else read_text(text)
    opened = open_model(model, LoadOptions(threads=threads, context=context, memory=memory))
    with stage_progress() as progress:
        made = make_profile(
            opened, out, text=corpus, tokens=tokens, predictors=names, progress=progress
        )
    typer.echo(as_json_text(made) if as_json else as_table(made))


def as_table(made: Profile) -> str:
    """What each predictor finds of the experts that held-out text uses, for people."""
    from .terminal import aligned, size

    recalls = made.recalls
    columns = sorted({(r.width, r.distance) for r in recalls})
    names: Sequence[str] = list(dict.fromkeys(r.predictor for r in recalls))
    of = {(r.predictor, r.width, r.distance): r for r in recalls}
    rows = [["recall", *(f"{w} wide, {d} ahead" for w, d in columns)]]
    for name in names:
        cells = [of[name, w, d] for w, d in columns]
        rows.append([name, *("-" if r.mean is None else f"{r.mean * 100:.1f}%" for r in cells)])
    head = f"{made.path}: {size(made.nbytes)}, {made.tokens} tokens, 1/8 of them held out"
    return "\n".join([head, "", *aligned(rows, left=1)])


def as_json_text(made: Profile) -> str:
    """Everything as one JSON object."""
    return json.dumps(asdict(made) | {"path": str(made.path)}, indent=2)

"""`stoker profile`: trains the predictors for a model, and shows their recall."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.errors import OptionError
from ..files.output_file import check_output
from ..options import LoadOptions
from ..terminal.options import Json, Model, take, with_tables
from ..terminal.profile_table import as_json_text, as_table

if TYPE_CHECKING:
    pass

_MOST_TOKENS = 1 << 20


@with_tables
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
    loading: LoadOptions = take(LoadOptions, only=("threads", "context", "memory")),
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
    from ...offload.profile.profile import PREDICTORS, check_predictors, make_profile
    from ..terminal.opening import open_named, read_text
    from ..terminal.terminal import stage_progress

    names = PREDICTORS if predictor == "all" else tuple(predictor.split(","))
    check_predictors(names)
    if not 256 <= tokens <= _MOST_TOKENS:
        raise OptionError(f"tokens: expected 256 to {_MOST_TOKENS}, found {tokens}")
    check_output(out, force=force)
    corpus = None if text is None else read_text(text)
    opened = open_named(model, loading)
    with stage_progress() as progress:
        made = make_profile(
            opened, out, text=corpus, tokens=tokens, predictors=names, progress=progress
        )
    typer.echo(as_json_text(made) if as_json else as_table(made))

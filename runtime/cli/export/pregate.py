"""`stoker export pregate`: makes a mixture whose experts are known a layer ahead."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...base.errors import OptionError
from ...options import LoadOptions
from ...terminal.options import Json, take, with_tables

if TYPE_CHECKING:
    from ....export.pregate import Pregated


@with_tables
def pregate(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            help="A GGUF mixture (llama, qwen2moe, qwen3moe, olmoe, smallthinker), or its name.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The GGUF file to make; with --hint-only a profile."),
    ],
    *,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to learn from [default: the model writes it itself]."),
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to measure on [default: an eighth of the text, kept aside]."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", "-n", help="Tokens of the text [default: 32768; 8192 if it writes]."
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Of training, at most.")] = 10.0,
    hint_only: Annotated[
        bool,
        typer.Option(
            "--hint-only", help="The model's own routers decide; the gates only tell what to read."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the training and of the model's own text.")] = 0,
    loading: LoadOptions = take(LoadOptions, only=("threads", "memory")),
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Make a mixture choose each layer's experts one layer ahead.

    Gates learn from the routers which experts the next layer will use, so that they are read while
    this layer computes. What that costs is shown as perplexity on text that was kept aside. Only
    stoker runs the file. With --hint-only nothing is lost: OUT is a profile for the same model.

    \b
    stoker export pregate mixture.gguf pregated.gguf --text my_corpus.txt
    stoker export pregate mixture.gguf pregated.gguf --text train.txt --test test.txt --minutes 30
    stoker export pregate mixture.gguf mixture.profile --hint-only
    stoker run mixture.gguf "Hello" --memory 1GiB --predictor linear --profile mixture.profile
    """
    from ....export import pregate as pregating
    from ....offload.profile.profile import make_profile
    from ...files.output_file import check_output
    from ...terminal import profile_table
    from ...terminal.opening import find, open_named, read_text
    from ...terminal.terminal import resumable, stage_progress

    if hint_only and test is not None:
        raise OptionError("--test: expected none with --hint-only, which changes no perplexity")
    corpus, measured = (None if file is None else read_text(file) for file in (text, test))
    amount = tokens if tokens is not None else 8192 if corpus is None else 32768
    path = find(base)
    if not minutes > 0:
        raise OptionError(f"minutes: expected more than 0, found {minutes}")
    if hint_only:
        check_output(out, [path], force=force)
        with stage_progress() as progress:
            hints = make_profile(
                open_named(str(path), loading),
                out,
                text=corpus,
                tokens=amount,
                predictors=("linear",),
                seed=seed,
                minutes=minutes,
                progress=progress,
            )
        show = profile_table.as_json_text if as_json else profile_table.as_table
        typer.echo(show(hints))
        return
    with resumable(lambda: pregating.resumable_part(out)), stage_progress() as progress:
        made = pregating.pregate(
            path,
            out,
            text=corpus,
            test_text=measured,
            tokens=amount,
            minutes=minutes,
            seed=seed,
            threads=loading.threads,
            memory=loading.memory,
            force=force,
            progress=progress,
        )
    typer.echo(as_json_text(made) if as_json else as_table(made))


def as_table(made: Pregated) -> str:
    """Returns lines for display about the file, each gate, and the loss in perplexity."""
    from ...base.display import size

    cost = made.perplexity / made.base_perplexity - 1
    lines = [
        f"{made.path}: {size(made.nbytes)}, learnt from {made.tokens} tokens, "
        f"measured on {made.held_out} others",
        "",
        "layer  experts right  weight right  KL (nats)",
    ]
    lines += [
        f"{g.layer:5}  {g.found * 100:12.1f}%  {g.weight * 100:11.1f}%  {g.kl:9.4f}"
        for g in made.gates
    ]
    lines += ["", f"perplexity {made.base_perplexity:.4f} -> {made.perplexity:.4f} ({cost:+.2%})"]
    return "\n".join(lines)


def as_json_text(made: Pregated) -> str:
    """Returns all results as one JSON object."""
    return json.dumps(asdict(made) | {"path": str(made.path)}, indent=2)

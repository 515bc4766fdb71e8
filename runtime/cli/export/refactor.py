"""`stoker export refactor`: makes a dense model a mixture whose experts are known early."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ....export.refactor import Refactored


def refactor(
    base: Annotated[
        str, typer.Argument(metavar="DENSE", help="A dense GGUF model (llama), or its name.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The GGUF file to make.")],
    *,
    experts: Annotated[
        int, typer.Option("--experts", "-e", help="Domains of tokens: experts in each layer.")
    ] = 16,
    used: Annotated[int, typer.Option("--used", "-k", help="Experts that each token uses.")] = 1,
    shared: Annotated[
        int | None,
        typer.Option(help="Channels that all tokens use, in each layer [default: half of them]."),
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Channels of an expert [default: a quarter of them].")
    ] = None,
    type: Annotated[
        str | None, typer.Option(help="Tensor type of the feed-forwards [default: as they are].")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text to fit to, repeatable; the last tenth of each is kept to measure on "
            "[default: the model writes it]."
        ),
    ] = None,
    minutes: Annotated[
        float, typer.Option("--minutes", "-m", help="For the fit, about; 0: split only.")
    ] = 10.0,
    seed: Annotated[int, typer.Option(help="Of domains, router and text.")] = 0,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", help="[default: all cores]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.")] = False,
) -> None:
    """Take a dense model apart: common channels for all tokens, experts for domains of tokens.

    One small router after the first layer chooses the experts of the token in all other layers, so
    that under --memory every read is known in advance. What a token does without is made up for by
    fitting the down projections to the dense model on this machine. The table says what it costs.
    OUT runs in stoker alone. Where shared + experts x width is the base's width each channel has
    one place; else experts share some.

    \b
    stoker export refactor smollm2 refactored.gguf --text corpus.txt
    stoker export refactor dense.gguf out.gguf -e 8 --shared 768 --width 384 -m 30 --text a.txt
    stoker export refactor dense.gguf split.gguf --minutes 0
    """
    from ....export.refactor import refactor as refactoring
    from ...terminal.opening import find, read_text
    from ...terminal.terminal import resumable, stage_progress

    texts = None if not text else [read_text(path) for path in text]
    path = find(base)
    with resumable(lambda: None), stage_progress() as progress:
        made = refactoring(
            path,
            out,
            experts=experts,
            used=used,
            shared=shared,
            width=width,
            type=type,
            text=texts,
            minutes=minutes,
            seed=seed,
            threads=threads,
            force=force,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps({**asdict(made), "path": str(made.path)}, indent=2))
    else:
        typer.echo(_table(made))


def _table(made: Refactored) -> str:
    """Returns aligned columns for display."""
    from ...base.display import aligned, size

    rows = [("", "perplexity", "change", "bytes a token")]
    for name, stage in (
        ("dense", made.dense),
        ("after splitting", made.split),
        (f"after fitting to {made.tokens} tokens", made.distilled),
    ):
        if stage is not None:
            change = stage.perplexity / made.dense.perplexity - 1
            cells = (f"{stage.perplexity:.3f}", f"{change:+.1%}", size(stage.token_bytes))
            rows.append((name, *cells))
    lines = aligned(rows, left=1)
    r = made.recipe
    lines.append(
        f"{made.path}: {size(made.nbytes)}; {r.shared} shared channels, {r.experts} experts of "
        f"{r.width} ({size(made.expert_bytes)}) a layer, {r.used} used"
    )
    return "\n".join(lines)

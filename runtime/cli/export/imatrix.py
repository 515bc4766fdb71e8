"""`stoker export imatrix`: measures how much an error in each column of the weights matters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def imatrix(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF model, or its name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The importance matrix to make.")],
    *,
    text: Annotated[
        Path, typer.Option("--text", "--file", help="UTF-8 text like that of the model's use.")
    ],
    chunk: Annotated[int, typer.Option(help="Tokens that see each other.")] = 512,
    chunks: Annotated[
        int | None, typer.Option(help="Chunks to use at most [default: the whole text]")
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", "-m", help="Budget of the model: 2GiB, 60%, auto.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", help="[default: all cores]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
) -> None:
    """Measure which weights matter on a text, for `stoker export quantize --imatrix`.

    For every column of every matrix, and of every expert: the mean square of what it multiplies.
    The file is llama.cpp's, either program reads the other's. 20 to 100 chunks are enough; the
    better the model's own precision, the better the measurement.

    \b
    stoker export imatrix model-f16.gguf model.imatrix.gguf --text corpus.txt
    stoker export imatrix model-f16.gguf model.imatrix.gguf --text corpus.txt --chunks 50
    """
    from ....export import imatrix as importances
    from ...base.display import size
    from ...terminal.opening import find, read_text
    from ...terminal.terminal import stage_progress

    corpus = read_text(text)
    path = find(model)
    with stage_progress() as progress:
        found, ppl = importances.collect(
            path,
            out,
            corpus,
            name=text.name,
            chunk=chunk,
            max_chunks=chunks,
            memory=memory,
            threads=threads,
            force=force,
            progress=progress,
        )
    typer.echo(
        f"{out}: {size(out.stat().st_size)}, {len(found.entries)} tensors, "
        f"{found.chunks} chunks of {found.chunk_size} tokens, perplexity {ppl:.2f}"
    )

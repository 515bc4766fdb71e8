"""`stoker perplexity`: measures how well a model predicts a text."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import LoadOptions
from ..terminal.options import Json, Model, Plan, Trace, take, with_tables
from ..terminal.terminal import progress_bars

if TYPE_CHECKING:
    from ..model import Model as LoadedModel


@with_tables
def perplexity(
    model: Model,
    file: Annotated[Path, typer.Argument(help="UTF-8 text; - reads stdin.")],
    *,
    window: Annotated[
        int | None, typer.Option("--context", "-c", help="Tokens of a window [default: 512].")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Overlap windows, score this many new tokens in each "
            "[default: disjoint windows, second halves scored, as llama.cpp does]."
        ),
    ] = None,
    max_chunks: Annotated[int | None, typer.Option(help="Windows to evaluate at most.")] = None,
    loading: LoadOptions = take(LoadOptions, without=("context",)),
    as_json: Json = False,
    plan: Plan = False,
    trace: Trace = None,
) -> None:
    """Measure how well a model predicts a text.

    \b
    stoker perplexity smollm2 wiki.txt
    stoker perplexity model.gguf wiki.txt --context 2048 --stride 512 --json
    zcat wiki.txt.gz | stoker perplexity smollm2 - --max-chunks 20
    stoker perplexity mixture.gguf wiki.txt --memory 1GiB --trace routing.csv.gz
    """
    from ..terminal.opening import open_named, read_text

    text = read_text(file)
    options = loading if window is None else replace(loading, context=window)
    measure(
        open_named(model, options, plan=plan, as_json=as_json),
        text,
        context=window,
        stride=stride,
        max_chunks=max_chunks,
        as_json=as_json,
        trace=trace,
    )


def measure(
    model: LoadedModel,
    text: str,
    *,
    context: int | None,
    stride: int | None,
    max_chunks: int | None,
    as_json: bool,
    trace: Path | None = None,
) -> None:
    """Prints the perplexity of `text`, with a progress bar on stderr in a terminal.

    trace: the file that records the routing.
    """
    from ..terminal.opening import recording

    bar: Any = nullcontext()
    report = None
    if sys.stderr.isatty():
        bar = progress_bars(transient=True)
        task = bar.add_task("perplexity", total=None)

        def report(done: int, total: int, ppl: float) -> None:
            bar.update(task, completed=done, total=total, description=f"perplexity {ppl:.4f}")

    with recording(model, trace), bar:
        result = model.perplexity(
            text, context=context, stride=stride, max_chunks=max_chunks, progress=report
        )
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        print(
            f"perplexity {result.ppl:.4f} +/- {result.error:.4f} "
            f"({result.nll:.5f} nats a token; {result.tokens} tokens scored "
            f"in {result.chunks} chunks)"
        )

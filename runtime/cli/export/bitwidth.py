"""`stoker export bitwidth`: chooses a width for each expert of a mixture."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...base.errors import OptionError

if TYPE_CHECKING:
    from ....export.bitwidth import Adapted, Point


def bitwidth(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF mixture, or its name.")],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="The GGUF file to make [default: none, see --curve]"),
    ] = None,
    *,
    text: Annotated[
        Path, typer.Option("--text", "--file", help="UTF-8 text like that of the model's use.")
    ],
    bits: Annotated[float | None, typer.Option(help="Bits a weight of the experts.")] = None,
    file_size: Annotated[
        str | None, typer.Option("--size", help="Of the whole file: 800MB, 1.5GiB.")
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(help="Percent by which the perplexity may grow; the smallest such file."),
    ] = None,
    types: Annotated[
        str, typer.Option(help="What experts may become, beside what they are; separated by commas")
    ] = "Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,Q8_0",
    curve: Annotated[
        int, typer.Option(help="Also measure the uniform types and this many sizes between.")
    ] = 0,
    steps: Annotated[
        int, typer.Option(help="Of the search, for each size; 0: the quick proxy alone.")
    ] = 24,
    tokens: Annotated[
        int, typer.Option(help="Of the text to search on; as many more for the report.")
    ] = 1024,
    window: Annotated[int, typer.Option(help="Tokens that see each other.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    imatrix: Annotated[
        Path | None, typer.Option(help="Importances [default: measured on the text]")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", "-m", help="Of the models measured [default: 1GiB or as needed]"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", help="[default: all cores]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
) -> None:
    """Give each expert of a mixture as many bits as its errors are worth.

    Few bits for experts whose errors cost little, many where they cost much: by the activations
    that each one meets, by what the error of each layer does to the model's answers, and by a
    search that runs the candidates. Prints sizes and perplexities beside those of the uniform
    types, on text that the search has not seen; where uniform is as good, that is what it shows.

    Needs room beside OUT for the experts in all types at once, until it is done. Ctrl-C leaves
    hidden files there; the same command goes on from them.

    \b
    stoker export bitwidth model-f16.gguf small.gguf --text corpus.txt --bits 3.5
    stoker export bitwidth model-f16.gguf small.gguf --text corpus.txt --max-loss 1
    stoker export bitwidth model-q8.gguf --text corpus.txt --curve 3 --json > curve.json
    """
    from ....export.bitwidth import Search, adapt, resumable_part
    from ...base.display import size
    from ...base.memory import byte_count
    from ...terminal.opening import find, read_text
    from ...terminal.terminal import resumable, stage_progress

    corpus = read_text(text)
    search = Search(tokens=tokens, window=window, steps=steps, seed=seed, memory=memory)
    if max_loss is not None and not max_loss > 0:
        raise OptionError(f"--max-loss must be above 0, not {max_loss}")
    path = find(model)
    with resumable(lambda: resumable_part(path, out)), stage_progress() as progress:
        found = adapt(
            path,
            out,
            corpus,
            bits=bits,
            nbytes=None if file_size is None else byte_count(file_size),
            loss=None if max_loss is None else max_loss / 100,
            types=[t.strip() for t in types.split(",")],
            curve=curve,
            imatrix=imatrix,
            search=search,
            threads=threads,
            force=force,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(_as_dict(found), indent=2))
        return
    typer.echo(_table(found))
    if found.path is not None:
        kinds = ", ".join(f"{n} {part} {type}" for (part, type), n in sorted(found.types.items()))
        typer.echo(f"\n{found.path}: {size(found.path.stat().st_size)}; experts: {kinds}")


def _as_dict(found: Adapted) -> dict[str, object]:
    return {
        "path": None if found.path is None else str(found.path),
        "source": asdict(found.source),
        "points": [asdict(p) for p in found.points],
        "made": None if found.made is None else asdict(found.made),
        "types": [{"part": p, "type": t, "matrices": n} for (p, t), n in found.types.items()],
    }


def _table(found: Adapted) -> str:
    """Returns aligned columns for display."""
    from ...base.display import aligned, size

    def row(p: Point, name: str) -> tuple[str, ...]:
        loss = p.ppl / found.source.ppl - 1
        cells = (size(p.nbytes), f"{p.bits:.3f}", f"{p.kl:.5f}", f"{p.ppl:.4f}", f"{loss:+.2%}")
        return (name, *cells)

    rows: list[tuple[str, ...]] = [("experts", "size", "bits", "KL", "perplexity", "change")]
    rows.append(row(found.source, "as in the source"))
    for p in found.points:
        made = "  <- written" if p == found.made else ""
        rows.append(row(p, (p.uniform or "adapted") + made))
    return "\n".join(aligned(rows, left=1))

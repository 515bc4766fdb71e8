"""`stoker export quantize`: stores a model's weights in smaller types."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def quantize(
    source: Annotated[
        str,
        typer.Argument(metavar="IN", help="A GGUF model (the first of its shards), or its name."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The GGUF file to make.")],
    *,
    type: Annotated[
        str,
        typer.Option(
            help="F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0 IQ4_NL "
            "IQ4_XS MXFP4 Q3_K_L Q3_K_M Q3_K_S Q2_K"
        ),
    ],
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB=TYPE",
            help="Another type for the tensors that match; repeatable, the last one decides.",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="Importances from `stoker export imatrix` or llama.cpp."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", help="[default: all cores]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
) -> None:
    """Store a model's weights in smaller types, mixed as llama.cpp mixes them.

    Start from a file of F32, F16 or BF16 where there is one. Any size works: weights pass through
    memory in pieces. Ctrl-C leaves a part beside OUT; the same command takes it up again.

    \b
    stoker export quantize model-f16.gguf model-q4.gguf --type Q4_K_M
    stoker export quantize model-f16.gguf small.gguf --type Q3_K_M --imatrix model.imatrix.gguf
    stoker export quantize model-f16.gguf out.gguf --type Q4_0 --override 'blk.*.ffn_down=Q6_K'
    """
    from ....export import quantize as quantizing
    from ....export.writer import mixes
    from ...base.display import size
    from ...terminal.opening import find
    from ...terminal.terminal import resumable, stage_progress

    overrides = [mixes.parse_override(text) for text in override or []]
    path = find(source)
    with resumable(lambda: quantizing.resumable_part(out)), stage_progress() as progress:
        made = quantizing.quantize(
            path,
            out,
            type=type,
            overrides=overrides,
            imatrix=imatrix,
            threads=threads,
            force=force,
            progress=progress,
        )
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    types = ", ".join(f"{count} {name}" for name, count in made.types.items())
    typer.echo(
        f"{made.path}: {size(made.nbytes)} from {size(made.source_nbytes)}, tensors: {types}"
    )

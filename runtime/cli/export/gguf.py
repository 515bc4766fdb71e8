"""`stoker export gguf`: converts a Hugging Face folder to a GGUF file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def gguf(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder with config.json, *.safetensors and the tokenizer's files."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The GGUF file to make.")],
    *,
    type: Annotated[
        str | None,
        typer.Option(
            help="File type such as Q4_K_M, Q8_0 or F16 [default: as the folder has them]."
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB=TYPE", help="Tensor type for some matrices; repeatable."),
    ] = None,
    pre: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Pre-tokenizer, where it is not recognised."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", min=1, help="[default: all cores]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
) -> None:
    """Convert a Hugging Face folder to a GGUF file that stoker and llama.cpp run.

    Llama, Mistral, Mixtral, Qwen 2 and 3 (also MoE), OLMoE, Gemma 3 (text) and SmallThinker.
    Weights are read piece by piece, so the folder may be larger than memory. Ctrl-C leaves a part
    beside OUT; the same command takes it up again.

    \b
    stoker export gguf SmolLM2-135M-Instruct smollm2.gguf
    stoker export gguf Qwen3-30B-A3B qwen3.gguf --type Q4_K_M
    stoker export gguf DIR out.gguf --type Q4_0 --override 'blk.*.ffn_down_exps=Q6_K'
    """
    from ....export import hf_to_gguf
    from ....export.writer import mixes
    from ...base.display import size
    from ...base.errors import OptionError
    from ...terminal.terminal import resumable, stage_progress

    overrides = [mixes.parse_override(text) for text in override or []]
    if overrides and type is None:
        raise OptionError("--override: expected together with --type, found no type")
    with resumable(lambda: hf_to_gguf.resumable_part(out)), stage_progress() as progress:
        made = hf_to_gguf.convert(
            folder,
            out,
            type=type,
            overrides=overrides,
            pre=pre,
            threads=threads,
            force=force,
            progress=progress,
        )
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    types = ", ".join(f"{count} {name}" for name, count in made.types.items())
    typer.echo(
        f"{made.path}: {made.architecture}, {size(made.nbytes)} of {size(made.source_nbytes)}, "
        f"tensors: {types}"
    )

"""`stoker export onnx`: converts a GGUF file or a Hugging Face folder to an ONNX decoder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def onnx(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A GGUF model, its name, or a Hugging Face folder.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .onnx file to make.")],
    *,
    type: Annotated[
        str,
        typer.Option(
            help="Of the matrices: keep (4 bits where that loses nothing, else 8), int4, int8, "
            "f16 or f32."
        ),
    ] = "keep",
    context: Annotated[
        int | None,
        typer.Option(
            "--context", "-c", help="Tokens it shall run [default: as trained, at most 8192]."
        ),
    ] = None,
    through: Annotated[
        str,
        typer.Option(
            help="How a folder is exported: gguf (as a GGUF file and then with stoker's own "
            "graph; families that stoker runs, every type), optimum (traced by optimum-onnx; "
            "f32 only), or auto: gguf, and optimum for other families."
        ),
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
) -> None:
    """Make an ONNX decoder with a KV cache, for onnxruntime and `stoker run OUT`.

    OUT holds graph, tokenizer and chat template, OUT.data beside it the weights. All families
    that stoker runs, from a GGUF file or from a folder; of other families folders only, through
    optimum-onnx where that is installed. Ctrl-C leaves a part beside OUT; the same command takes
    it up again.

    \b
    stoker export onnx smollm2 smollm2.onnx
    stoker export onnx model-f16.gguf model.onnx --type int4
    stoker export onnx hf_folder/ model.onnx --type f32
    stoker export onnx hf_folder/ model.onnx --through optimum
    stoker run smollm2.onnx "What is gravity?"
    """
    from ....export.hf_to_onnx import hf_to_onnx
    from ....export.to_onnx import gguf_to_onnx, interrupted_part
    from ...base.display import size
    from ...base.errors import OptionError
    from ...terminal.opening import find
    from ...terminal.terminal import byte_progress, resumable

    folder = Path(source).is_dir()
    if not folder and through == "optimum":
        raise OptionError("--through optimum expects a Hugging Face folder")
    path = Path(source) if folder else find(source)
    with resumable(lambda: interrupted_part(out)), byte_progress() as progress:
        if folder:
            made = hf_to_onnx(
                path,
                out,
                type=type,
                context=context,
                through=through,
                force=force,
                progress=progress,
            )
        else:
            made = gguf_to_onnx(
                path, out, type=type, context=context, force=force, progress=progress
            )
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    typer.echo(
        f"{made.path}: {size(made.nbytes)}, {made.context} tokens of context, through {made.route}"
    )

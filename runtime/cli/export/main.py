"""`stoker export`: makes model files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .bitwidth import bitwidth
from .gguf import gguf
from .imatrix import imatrix
from .onnx import onnx
from .pregate import pregate
from .quantize import quantize
from .quantize_onnx import quantize_onnx
from .refactor import refactor
from .tflite import tflite
from .verify import verify

app = typer.Typer(
    name="export",
    help="Make model files from other model files.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
)


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Make model files from other model files.

    \b
    stoker export gguf SmolLM2-135M-Instruct smollm2.gguf
    stoker export upcycle smollm2 mixture.gguf --experts 64 --used 4
    stoker export quantize model-f16.gguf model-q4.gguf --type Q4_K_M
    stoker export bitwidth mixture-f16.gguf small.gguf --text corpus.txt --bits 4
    stoker export imatrix model-f16.gguf model.imatrix.gguf --text corpus.txt
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def upcycle(
    base: Annotated[
        str,
        typer.Argument(metavar="BASE", help="A dense GGUF model (llama, qwen2), or its name."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The GGUF file to make.")],
    *,
    experts: Annotated[int, typer.Option("--experts", "-e", help="Experts in each layer.")],
    used: Annotated[int, typer.Option("--used", "-k", help="Experts that each token uses.")],
    arch: Annotated[
        str | None,
        typer.Option(help="llama or qwen2moe (has a shared expert) [default: as the base]."),
    ] = None,
    type: Annotated[str, typer.Option(help="Tensor type of the experts.")] = "Q4_0",
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to fit the routers to [default: the base writes it]."),
    ] = None,
    router: Annotated[
        str, typer.Option(help="kmeans, or random: all experts alike, the worst case of a cache.")
    ] = "kmeans",
    noise: Annotated[float, typer.Option(help="Of the experts' weights, relative.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of orders, noise, routers and text.")] = 0,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", help="[default: all cores]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
) -> None:
    """Make a mixture of experts from a dense model: any size, and it still speaks.

    Each expert is the dense feed-forward with its neurons in another order and a little noise;
    the router follows real hidden states. It is how to try expert offloading at any size without
    a large model. Ctrl-C leaves a part beside OUT; the same command takes it up again.

    \b
    stoker export upcycle smollm2 mixture.gguf --experts 64 --used 4
    stoker export upcycle base.gguf out.gguf -e 128 -k 8 --arch qwen2moe --type Q8_0
    stoker export upcycle base.gguf out.gguf -e 64 -k 4 --text my_corpus.txt
    stoker export upcycle base.gguf worst.gguf -e 64 -k 4 --router random
    """
    from ....export import upcycle as upcycling
    from ...base.display import size
    from ...terminal.opening import find, read_text
    from ...terminal.terminal import resumable, stage_progress

    corpus = None if text is None else read_text(text)
    path = find(base)
    with resumable(lambda: upcycling.resumable_part(out)), stage_progress() as progress:
        made = upcycling.upcycle(
            path,
            out,
            experts=experts,
            used=used,
            architecture=arch,
            type=type,
            text=corpus,
            router=router,
            noise=noise,
            seed=seed,
            threads=threads,
            force=force,
            progress=progress,
        )
    typer.echo(
        f"{made.path}: {size(made.nbytes)}, {experts} experts of {size(made.expert_bytes)} a layer"
    )


app.command("gguf")(gguf)
app.command("quantize")(quantize)
app.command("pregate")(pregate)
app.command("refactor")(refactor)
app.command("imatrix")(imatrix)
app.command("bitwidth")(bitwidth)
app.command("verify")(verify)
app.command("onnx")(onnx)
app.command("tflite")(tflite)
app.command("quantize-onnx")(quantize_onnx)

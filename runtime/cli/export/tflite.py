"""`stoker export tflite`: converts a tflite model to ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def tflite(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A .tflite file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The ONNX file to make.")],
    *,
    activations: Annotated[
        str,
        typer.Option(
            help="Of int8 models, between operators: int8, or uint8 with the same reals, faster on"
            " x86 with VNNI (before VNNI sums may saturate)."
        ),
    ] = "int8",
    hybrid: Annotated[
        str,
        typer.Option(
            help="Operators of float inputs and int8 weights: dynamic, as tflite's reference"
            " kernel computes them, or float, more exact and faster."
        ),
    ] = "dynamic",
    evaluate: Annotated[
        Path | None,
        typer.Option(
            help="Samples that both models run on, the tflite file in its own interpreter (package"
            " ai-edge-litert): a folder of images, .npy, .npz or .bin files, or one .npy or .npz."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Their classes: a CSV of file name and class, or `folders`."),
    ] = None,
    raw: Annotated[
        str, typer.Option(help="Of .bin files: int8, uint8 or float32 values.")
    ] = "int8",
    mean: Annotated[
        str, typer.Option(help="Of float models: subtracted from pixels or raw values.")
    ] = "0",
    scale: Annotated[
        str, typer.Option(help="Then multiplied: one value or R,G,B; 1/255 and 0.0039 both do.")
    ] = "1",
    reference_kernels: Annotated[
        bool | None,
        typer.Option(
            "--reference-kernels/--default-kernels",
            help="The interpreter's plain kernels, or its fast ones"
            " [default: plain for models with int8 weights and float inputs].",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", help="[default: all cores]", min=1)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
) -> None:
    """Convert a tflite model to ONNX: float to float32, int8 to QDQ with the file's own scales.

    Inputs and outputs keep their names, types and NHWC shapes. An operator that has no
    conversion is named with its index, and nothing is written.

    \b
    stoker export tflite resnet8.tflite resnet8.onnx
    stoker export tflite resnet8_int8.tflite resnet8_int8.onnx
    stoker export tflite resnet8.tflite resnet8.onnx --evaluate test/ --labels folders
    stoker export tflite keywords.tflite keywords.onnx --hybrid float
    """
    from ....export import tflite as converting
    from ....export.onnx.samples import Preprocessing
    from ...base.display import size
    from ...terminal.terminal import stage_progress
    from .measured_table import table
    from .preprocessing_options import numbers

    preprocessing = Preprocessing(
        mean=numbers("mean", mean), scale=numbers("scale", scale), raw=raw
    )
    with stage_progress() as progress:
        made = converting.convert(
            source,
            out,
            activations=activations,
            hybrid=hybrid,
            evaluation=evaluate,
            labels=labels,
            preprocessing=preprocessing,
            reference_kernels=reference_kernels,
            threads=threads,
            force=force,
            progress=progress,
        )
    if made.reference is not None and made.measured is not None:
        for line in table(made.reference, made.measured):
            typer.echo(line)
    kind = "int8 (QDQ)" if made.quantized else "float32"
    typer.echo(f"{made.path}: {size(made.nbytes)}, {made.operators} operators, {kind}")
    if made.hybrids and hybrid == "dynamic":
        typer.echo(
            f"{made.hybrids} of them have int8 weights and float inputs, which they round to 8 bits"
            " as in tflite; --hybrid float keeps the inputs as they are"
        )

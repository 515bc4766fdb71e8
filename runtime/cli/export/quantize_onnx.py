"""`stoker export quantize-onnx`: makes an int8 ONNX model and compares it with its float source."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .preprocessing_options import height_and_width, numbers


def quantize_onnx(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A float ONNX model.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The ONNX file to make.")],
    *,
    static: Annotated[
        bool,
        typer.Option(
            "--static/--dynamic",
            help="Activations: scales from calibration (CNNs), or as they come (encoders).",
        ),
    ] = True,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            "-c",
            help="Inputs like real ones: a folder of images, .npy, .npz or .bin files (--raw), one"
            " sample each; or one .npy or .npz whose first axis counts samples.",
        ),
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option(help="Inputs to measure with [default: the calibration data].")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Their classes: a CSV of file name (or any first column) and class (the last)"
            " column, or `folders`: each folder a class, in order of name. An .npz may hold"
            " `labels` itself."
        ),
    ] = None,
    per_channel: Annotated[
        bool, typer.Option(help="A scale for each channel of the weights.")
    ] = True,
    method: Annotated[
        str, typer.Option(help="Ranges of activations: minmax, or percentile (99.99).")
    ] = "minmax",
    activations: Annotated[
        str,
        typer.Option(
            help="uint8: fastest on x86 with VNNI, but sums may saturate before VNNI; int8: exact."
        ),
    ] = "uint8",
    samples: Annotated[int, typer.Option(help="Samples that calibrate, evenly over all.")] = 200,
    size: Annotated[
        str | None, typer.Option(help="Of images: HEIGHTxWIDTH [default: the model's].")
    ] = None,
    raw: Annotated[
        str, typer.Option(help="Of .bin files: int8, uint8 or float32 values.")
    ] = "int8",
    mean: Annotated[
        str, typer.Option(help="Subtracted from pixels or raw values: one value, or R,G,B.")
    ] = "0",
    scale: Annotated[
        str, typer.Option(help="Then multiplied: one value or R,G,B; 1/255 and 0.0039 both do.")
    ] = "1",
    layout: Annotated[
        str | None, typer.Option(help="nhwc or nchw [default: as the model's shape says].")
    ] = None,
    crop: Annotated[
        bool, typer.Option("--crop", help="The middle of an image, else all of it stretched.")
    ] = False,
    bgr: Annotated[bool, typer.Option("--bgr", help="Blue before red.")] = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Keep float: node names or operator types, with * (repeatable); a node without a"
            " name is fitted by its type."
        ),
    ] = None,
    reduce_range: Annotated[
        bool,
        typer.Option("--reduce-range", help="7-bit weights, for x86 processors without VNNI."),
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", help="[default: all cores]", min=1)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
) -> None:
    """Quantize an ONNX model to int8, and say what it costs: one table, before and after.

    With labels the table has the accuracy, without them the error of the first output.

    \b
    stoker export quantize-onnx net.onnx net8.onnx -c photos/ --scale 1/255
    stoker export quantize-onnx net.onnx net8.onnx -c photos/ --evaluate test/ --labels folders
    stoker export quantize-onnx net.onnx net8.onnx -c photos/ --mean 123.7,116.3,103.5 \\
        --scale 1/58.4,1/57.1,1/57.4 --size 224x224 --crop
    stoker export quantize-onnx bert.onnx bert8.onnx --dynamic --evaluate tokens.npz
    """
    from ....export import onnx_quantize as quantizing
    from ....export.onnx.samples import Preprocessing
    from ...base.display import size as readable
    from ...terminal.terminal import stage_progress
    from .measured_table import table

    preprocessing = Preprocessing(
        size=height_and_width(size),
        layout=layout,
        mean=numbers("mean", mean),
        scale=numbers("scale", scale),
        crop=crop,
        bgr=bgr,
        raw=raw,
    )
    with stage_progress() as progress:
        made = quantizing.quantize(
            source,
            out,
            static=static,
            calibration=calibrate,
            evaluation=evaluate,
            labels=labels,
            preprocessing=preprocessing,
            per_channel=per_channel,
            method=method,
            activations=activations,
            samples=samples,
            exclude=exclude or (),
            reduce_range=reduce_range,
            threads=threads,
            force=force,
            progress=progress,
        )
    if made.before is not None and made.after is not None:
        for line in table(made.before, made.after):
            typer.echo(line)
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    typer.echo(f"{made.path}: {readable(made.nbytes)}")

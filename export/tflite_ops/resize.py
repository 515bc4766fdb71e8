"""RESIZE_BILINEAR, RESIZE_NEAREST_NEIGHBOR, DEPTH_TO_SPACE and SPACE_TO_DEPTH."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...runtime.base.errors import ModelFileError
from .convolution import shape_nhwc
from .file import Array, Operator
from .graph import Graph
from .shapes import move


def _sizes(graph: Graph, operator: Operator) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of the input and, from a constant input, of the output."""
    _, height, width, _ = shape_nhwc(graph, operator, 0)
    wanted = graph.ints(operator, 1) or []
    if len(wanted) != 2 or min(wanted) < 1:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected a height and a width, found {wanted}"
        )
    if operator.options["AlignCorners"] and operator.options["HalfPixelCenters"]:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected aligned corners or centers, found both"
        )
    return (height, width), (wanted[0], wanted[1])


def bilinear(graph: Graph, operator: Operator) -> None:
    """Pixel i is taken at i * in / out; or (i + 1/2) * in / out - 1/2; or i * (in - 1) / (out - 1).

    The first is the default, the others are for half pixel centers and aligned corners.
    """
    _, (height, width) = _sizes(graph, operator)
    mode = "asymmetric"
    if operator.options["HalfPixelCenters"]:
        mode = "half_pixel"
    elif operator.options["AlignCorners"]:
        mode = "align_corners"
    batch, _, _, channels = shape_nhwc(graph, operator, 0)
    real = graph.real(operator.inputs[0], "nchw")
    if batch < 0:  # sizes instead of scales, which float32 does not hold exactly
        one = [graph.shared(np.array([i], np.int64)) for i in (0, 1)]
        first = graph.node("Slice", [graph.node("Shape", [real]), *one])
        rest = graph.shared(np.array([channels, height, width], np.int64))
        sizes = graph.node("Concat", [first, rest], axis=0)
    else:
        sizes = graph.shared(np.array([batch, channels, height, width], np.int64))
    graph.finish_real(
        operator,
        "nchw",
        "Resize",
        real,
        "",
        "",
        sizes,
        mode="linear",
        coordinate_transformation_mode=mode,
    )


def nearest(graph: Graph, operator: Operator) -> None:
    """Gathers rows and columns whose indices are computed here, in float32 as the kernel does."""
    before, after = _sizes(graph, operator)
    aligned = bool(operator.options["AlignCorners"])
    centers = bool(operator.options["HalfPixelCenters"])
    layout = graph.common_layout(replace(operator, inputs=operator.inputs[:1]))
    name = graph.stored(operator.inputs[0], layout)
    first = 2 if layout == "nchw" else 1
    graph.check_count(operator, max(after))
    rows, columns = (
        graph.shared(_nearest(n, m, aligned, centers)) for n, m in zip(before, after, strict=True)
    )
    name = graph.node("Gather", [name, rows], axis=first)
    move(graph, operator, layout, "Gather", name, columns, axis=first + 1)


def _nearest(size: int, wanted: int, aligned: bool, centers: bool) -> Array:
    """The input index [wanted] of each output."""
    exact = np.float32(size) / np.float32(wanted)
    if aligned and wanted > 1:
        exact = np.float32(size - 1) / np.float32(wanted - 1)
    at = (np.arange(wanted, dtype=np.float32) + np.float32(0.5 if centers else 0)) * exact
    # Halves are rounded away from zero; no index is negative.
    index = np.floor(at + np.float32(0.5)) if aligned else np.floor(at)
    clipped: Array = np.clip(index, 0, size - 1).astype(np.int64)
    return clipped


def depth_to_space(graph: Graph, operator: Operator) -> None:
    """Turns channels [b, b, C] of a pixel into b x b pixels of C channels."""
    block = _block(graph, operator)
    _, height, width, channels = shape_nhwc(graph, operator, 0)
    if channels % (block * block):
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected channels in {block} x {block}, found"
            f" {channels}"
        )
    depth = channels // (block * block)
    apart = [-1, height, width, block, block, depth]
    joined = [-1, height * block, width * block, depth]
    _blocks(graph, operator, "DepthToSpace", block=block, apart=apart, joined=joined)


def space_to_depth(graph: Graph, operator: Operator) -> None:
    """Turns b x b pixels of C channels into one of channels [b, b, C]."""
    block = _block(graph, operator)
    _, height, width, channels = shape_nhwc(graph, operator, 0)
    if height % block or width % block:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected sizes in {block}, found {height} x {width}"
        )
    height, width = height // block, width // block
    apart = [-1, height, block, width, block, channels]
    joined = [-1, height, width, block * block * channels]
    _blocks(graph, operator, "SpaceToDepth", block=block, apart=apart, joined=joined)


def _block(graph: Graph, operator: Operator) -> int:
    block = int(operator.options["BlockSize"])
    if block < 1:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected a positive block, found {block}"
        )
    return block


def _blocks(
    graph: Graph,
    operator: Operator,
    kind: str,
    *,
    block: int,
    apart: list[int],
    joined: list[int],
) -> None:
    source = graph.tensor(operator.inputs[0])
    if source.type == "FLOAT32":
        name = graph.stored(source.index, "nchw")
        move(graph, operator, "nchw", kind, name, blocksize=block)
        return
    # onnxruntime has this operator for few types, but its parts for all.
    shape = graph.shared(np.array(apart, np.int64))
    parts = graph.node("Reshape", [graph.stored(source.index), shape])
    parts = graph.node("Transpose", [parts], perm=[0, 1, 3, 2, 4, 5])
    shape = graph.shared(np.array(joined, np.int64))
    move(graph, operator, "file", "Reshape", parts, shape)

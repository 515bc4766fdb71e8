"""AVERAGE_POOL_2D, MAX_POOL_2D (with positions, too), MEAN, SUM, REDUCE_MAX and REDUCE_MIN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto

from ...runtime.base.errors import ModelFileError
from .convolution import shape_nhwc, window
from .file import Operator
from .graph import Graph, Layout


def average_pool(graph: Graph, operator: Operator) -> None:
    """Averages each window over the pixels inside the image: padding is not counted."""
    kernel = operator.options["FilterHeight"], operator.options["FilterWidth"]
    found = window(graph, operator, kernel)
    activation = operator.options["FusedActivationFunction"]
    source = graph.real(operator.inputs[0], "nchw")
    if kernel == shape_nhwc(graph, operator, 0)[1:3] and not any(found["pads"]):
        # There is one window if the strides leave no second: runtimes have an int8 kernel for it.
        graph.finish_real(operator, "nchw", "GlobalAveragePool", source, activation=activation)
        return
    del found["dilations"]  # all 1; ONNX has had them only since opset 19
    graph.finish_real(
        operator,
        "nchw",
        "AveragePool",
        source,
        activation=activation,
        kernel_shape=list(kernel),
        count_include_pad=0,
        **found,
    )


def max_pool(graph: Graph, operator: Operator) -> None:
    """Takes the largest of each window; padding never wins."""
    kernel = operator.options["FilterHeight"], operator.options["FilterWidth"]
    graph.finish_real(
        operator,
        "nchw",
        "MaxPool",
        graph.real(operator.inputs[0], "nchw"),
        activation=operator.options["FusedActivationFunction"],
        kernel_shape=list(kernel),
        **window(graph, operator, kernel),
    )


def max_pool_argmax(graph: Graph, operator: Operator) -> None:
    """Adds MediaPipe's max pool: the second output is the position of each maximum in its window.

    The position is a real number: row * width of the window + column, plus 0.1. Source:
    mediapipe/util/tflite/operations/max_pool_argmax.cc.
    """
    options = operator.options
    kernel = options["FilterHeight"], options["FilterWidth"]
    found, (_, height, width, _) = window(graph, operator, kernel), shape_nhwc(graph, operator, 0)
    values, places = operator.outputs
    _, rows, columns, _ = shape_nhwc(graph, replace(operator, inputs=(values,)), 0)
    graph.check_count(operator, rows + columns)
    output = replace(operator, outputs=(values,))
    source = graph.real(operator.inputs[0], "nchw")
    largest, at = graph.nodes("MaxPool", [source], 2, kernel_shape=list(kernel), **found)
    activation = options["FusedActivationFunction"]
    graph.finish_real(output, "nchw", "Identity", largest, activation=activation)

    def integer(kind: str, left: str, right: Any) -> str:
        return graph.node(kind, [left, graph.shared(np.asarray(right, np.int64))])

    # ONNX's index runs over batch, channels, rows and columns of the image.
    pixel = integer("Mod", at, height * width)
    top, left = found["pads"][:2]
    begins = np.arange(rows).reshape(-1, 1) * found["strides"][0] - top
    row = integer("Sub", integer("Div", pixel, width), begins)
    begins = np.arange(columns) * found["strides"][1] - left
    column = integer("Sub", integer("Mod", pixel, width), begins)
    place = graph.node("Add", [integer("Mul", row, kernel[1]), column])
    tenth = graph.shared(np.array(0.1, np.float32))
    place = graph.node("Cast", [place], to=TensorProto.FLOAT)
    graph.finish_real(replace(operator, outputs=(places,)), "nchw", "Add", place, tenth)


_REDUCTIONS = {
    "MEAN": "ReduceMean",
    "REDUCE_MAX": "ReduceMax",
    "REDUCE_MIN": "ReduceMin",
    "SUM": "ReduceSum",
}


def reduction(graph: Graph, operator: Operator) -> None:
    """Adds MEAN, SUM, REDUCE_MAX and REDUCE_MIN over constant axes; images need no transposes."""
    source, kind = graph.tensor(operator.inputs[0]), _REDUCTIONS[operator.name]
    rank, axes = source.rank, graph.ints(operator, 1) or []
    if any(not -rank <= a < rank for a in axes):
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected axes of {rank} dimensions, found {axes}"
        )
    axes = sorted({a % rank for a in axes})
    keep = bool(operator.options["KeepDims"])
    layout: Layout = "file"
    if rank == 4 and axes == [1, 2] and graph.made(source.index, "nchw"):
        axes = [2, 3]  # without these axes, [N, C] is the same in both layouts
        layout = "nchw" if keep else "file"
        real = graph.real(source.index, "nchw")
        if keep and kind == "ReduceMean":
            graph.finish_real(operator, "nchw", "GlobalAveragePool", real)
            return
    else:
        real = graph.real(source.index)
    if not axes:
        graph.finish_real(operator, "file", "Identity", real)
    elif kind == "ReduceSum":  # ReduceSum's axes are an input since opset 13
        along = graph.shared(np.array(axes, np.int64))
        graph.finish_real(operator, layout, kind, real, along, keepdims=int(keep))
    else:
        graph.finish_real(operator, layout, kind, real, axes=axes, keepdims=int(keep))

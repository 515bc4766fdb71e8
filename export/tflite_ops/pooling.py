"""AVERAGE_POOL_2D, MAX_POOL_2D and MEAN."""

from __future__ import annotations

from ...runtime.errors import ModelFileError
from .convolution import shape_nhwc, window
from .file import Operator
from .graph import Graph


def average_pool(graph: Graph, operator: Operator) -> None:
    """Averages over what lies inside the image: padding is not counted."""
    kernel = operator.options["FilterHeight"], operator.options["FilterWidth"]
    found = window(graph, operator, kernel)
    activation = operator.options["FusedActivationFunction"]
    source = graph.real(operator.inputs[0], "nchw")
    if kernel == shape_nhwc(graph, operator, 0)[1:3] and not any(found["pads"]):
        # One window, if the strides leave no second one: runtimes have an int8 kernel for it.
        graph.finish_real(operator, "nchw", "GlobalAveragePool", source, activation=activation)
        return
    del found["dilations"]  # 1; ONNX has had them only since opset 19
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
    """The largest of each window; padding never wins."""
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


def mean(graph: Graph, operator: Operator) -> None:
    """The mean over constant axes; over the image it needs no transpose."""
    source = graph.tensor(operator.inputs[0])
    rank, axes = source.rank, graph.ints(operator, 1) or []
    if any(not -rank <= a < rank for a in axes):
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected axes of {rank} dimensions, found {axes}"
        )
    axes = sorted({a % rank for a in axes})
    keep = bool(operator.options["KeepDims"])
    if rank == 4 and axes == [1, 2] and graph.made(source.index, "nchw"):
        real = graph.real(source.index, "nchw")
        if keep:
            graph.finish_real(operator, "nchw", "GlobalAveragePool", real)
        else:  # [N, C] is the same in both layouts
            graph.finish_real(operator, "file", "ReduceMean", real, axes=[2, 3], keepdims=0)
        return
    if not axes:
        graph.finish_real(operator, "file", "Identity", graph.real(source.index))
        return
    graph.finish_real(
        operator, "file", "ReduceMean", graph.real(source.index), axes=axes, keepdims=int(keep)
    )

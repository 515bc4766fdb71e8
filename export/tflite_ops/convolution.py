"""CONV_2D, DEPTHWISE_CONV_2D and FULLY_CONNECTED: weights, biases and TensorFlow's padding."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...runtime.base.errors import ModelFileError, UnsupportedModelError
from . import hybrid
from .file import Array, Operator, Tensor, is_hybrid
from .graph import Graph, Layout

SAME = 0  # the schema's Padding: SAME, VALID


def window(graph: Graph, operator: Operator, kernel: tuple[int, int]) -> dict[str, Any]:
    """strides, dilations and pads (top, left, bottom, right) of a convolution or pool.

    SAME: the output has ceil(input / stride) rows; of an odd number of rows of padding the
    larger half is below.
    """
    options = operator.options
    strides = options["StrideH"], options["StrideW"]
    dilations = options.get("DilationHFactor", 1), options.get("DilationWFactor", 1)
    _, height, width, _ = shape_nhwc(graph, operator, 0)
    pads = []
    for size, k, stride, dilation in zip((height, width), kernel, strides, dilations, strict=True):
        if k < 1 or stride < 1 or dilation < 1:
            raise ModelFileError(
                f"{graph.file.path}: {operator}: expected a positive window, stride and dilation,"
                f" found {k}, {stride} and {dilation}"
            )
        reach = (k - 1) * dilation + 1
        if options["Padding"] == SAME:
            needed = max((-(-size // stride) - 1) * stride + reach - size, 0)
            pads.append((needed // 2, needed - needed // 2))
        elif reach > size:
            raise ModelFileError(
                f"{graph.file.path}: {operator}: expected a window within {size}, found {reach}"
            )
        else:
            pads.append((0, 0))
    return {
        "strides": list(strides),
        "dilations": list(dilations),
        "pads": [pads[0][0], pads[1][0], pads[0][1], pads[1][1]],
    }


def shape_nhwc(graph: Graph, operator: Operator, position: int) -> tuple[int, ...]:
    """The shape of an input that must have four dimensions; -1 if the batch is free."""
    tensor = graph.tensor(operator.inputs[position])
    if tensor.rank != 4:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected four dimensions in input {position},"
            f" found {list(tensor.shape)}"
        )
    return tensor.shape


def conv_2d(graph: Graph, operator: Operator) -> None:
    """Turns weights [out, height, width, in / groups] to [out, in / groups, height, width]."""
    weights = constant_weights(graph, operator, rank=4)
    assert weights.data is not None
    outputs, _, _, depth = weights.shape
    channels = shape_nhwc(graph, operator, 0)[3]
    if channels % depth or outputs % (channels // depth):
        raise ModelFileError(
            f"{graph.file.path}: {operator}: weights {list(weights.shape)} do not fit"
            f" {channels} input channels"
        )
    check_axis(graph, operator, weights, 0)
    data = weights.data.transpose(0, 3, 1, 2)
    _convolve(graph, operator, data, channels // depth)


def depthwise_conv_2d(graph: Graph, operator: Operator) -> None:
    """Adds a grouped Conv; weights [1, height, width, out] -> [out, 1, height, width]."""
    weights = constant_weights(graph, operator, rank=4)
    assert weights.data is not None
    one, _, _, outputs = weights.shape
    channels = shape_nhwc(graph, operator, 0)[3]
    if one != 1 or outputs % channels:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: weights {list(weights.shape)} do not fit"
            f" {channels} input channels"
        )
    check_axis(graph, operator, weights, 3)
    data = weights.data.transpose(3, 0, 1, 2)
    between = graph.hybrids and not graph.float_hybrids and weights.type == "FLOAT32"
    if not between or outputs != channels:
        _convolve(graph, operator, data, channels)
        return
    source, bias = graph.real(operator.inputs[0], "nchw"), bias_of(graph, operator, outputs)
    found = window(graph, operator, (data.shape[2], data.shape[3]))
    sums = hybrid.add_in_order(graph, operator, weights=data, source=source, bias=bias, found=found)
    activation = operator.options["FusedActivationFunction"]
    graph.finish_real(operator, "nchw", "Identity", sums, activation=activation)


def _convolve(graph: Graph, operator: Operator, weights: Array, groups: int) -> None:
    """Adds a Conv with weights [out, in / groups, height, width]."""
    outputs, kernel = weights.shape[0], (weights.shape[2], weights.shape[3])
    source = graph.real(operator.inputs[0], "nchw")
    attributes = {"kernel_shape": list(kernel), "group": groups}
    attributes |= window(graph, operator, kernel)
    _product(
        graph,
        operator,
        "nchw",
        "Conv",
        source=source,
        weights=weights,
        outputs=outputs,
        attributes=attributes,
    )


def _product(
    graph: Graph,
    operator: Operator,
    layout: Layout,
    kind: str,
    *,
    source: str,
    weights: Array,
    outputs: int,
    attributes: dict[str, Any],
) -> None:
    """Adds the operator's output: a Conv or Gemm of `source`, bias and activation."""
    tensor, bias = graph.tensor(operator.inputs[1]), bias_of(graph, operator, outputs)
    activation = operator.options["FusedActivationFunction"]
    output = graph.tensor(operator.outputs[0])
    if is_hybrid(graph.file, operator) and not graph.float_hybrids:
        hybrid.check_symmetric(graph, operator, tensor)
        sums = hybrid.multiply(
            graph, operator, kind, weights=weights, source=source, bias=bias, **attributes
        )
        if kind == "Gemm" and output.rank != 2:
            sums = graph.node("Reshape", [sums, graph.shared(np.array(output.shape, np.int64))])
        graph.finish_real(operator, layout, "Identity", sums, activation=activation)
        return
    operands = [source, graph.weight(tensor.index, weights, 0), *bias]
    if kind == "Gemm" and output.rank != 2:
        product = graph.node(kind, operands, **attributes)
        shape = graph.shared(np.array(output.shape, np.int64))
        graph.finish_real(operator, layout, "Reshape", product, shape, activation=activation)
    else:
        graph.finish_real(operator, layout, kind, *operands, activation=activation, **attributes)


def fully_connected(graph: Graph, operator: Operator) -> None:
    """Adds a Gemm over all but the last dimension of the input; weights [out, in]."""
    if operator.options["WeightsFormat"]:
        raise UnsupportedModelError(
            f"{graph.file.path}: {operator}: expected plain weights, found shuffled ones"
        )
    weights = constant_weights(graph, operator, rank=2)
    assert weights.data is not None
    check_axis(graph, operator, weights, 0)
    outputs, depth = weights.shape
    source = graph.tensor(operator.inputs[0])
    if source.shape[1:] == (depth,):
        name = graph.real(source.index)
    else:
        shape = graph.shared(np.array([-1, depth], np.int64))
        name = graph.node("Reshape", [flat_source(graph, source), shape])
        if source.quantized:
            name = graph.dequantized(name, source)
    if source.type != "FLOAT32" and not source.quantized:
        raise UnsupportedModelError(
            f"{graph.file.path}: {operator}: expected reals as input, found {source.type}"
        )
    _product(
        graph,
        operator,
        "file",
        "Gemm",
        source=name,
        weights=weights.data,
        outputs=outputs,
        attributes={"transB": 1},
    )


def flat_source(graph: Graph, source: Tensor) -> str:
    """The stored tensor as a Reshape's input: its elements in the file's order.

    A single pixel's channels are in the same order in both layouts, so the usual way from
    convolutions to a classifier needs no transpose.
    """
    pixel = source.rank == 4 and source.shape[1:3] == (1, 1)
    return graph.stored(
        source.index, "nchw" if pixel and graph.made(source.index, "nchw") else "file"
    )


def constant_weights(graph: Graph, operator: Operator, rank: int) -> Tensor:
    """The second input: constants of a type that products can be computed with."""
    weights = graph.tensor(operator.inputs[1])
    if weights.data is None:
        raise UnsupportedModelError(
            f"{graph.file.path}: {operator}: expected constant weights, found the tensor"
            f" {weights.name} that is computed"
        )
    if weights.rank != rank:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected weights of {rank} dimensions, found"
            f" {list(weights.shape)}"
        )
    if weights.type not in ("FLOAT32", "FLOAT16") and not (
        weights.quantized and weights.type in ("INT8", "UINT8")
    ):
        raise UnsupportedModelError(
            f"{graph.file.path}: {operator}: expected weights of FLOAT32, FLOAT16, INT8 or UINT8,"
            f" found {weights.type}"
        )
    return weights


def check_axis(graph: Graph, operator: Operator, weights: Tensor, axis: int) -> None:
    """Refuses scales along another axis of the weights."""
    q = weights.quantization
    if q is not None and not q.per_tensor and q.axis != axis:
        raise UnsupportedModelError(
            f"{graph.file.path}: {operator}: expected scales along axis {axis} of the weights,"
            f" found {q.axis}"
        )


def bias_of(graph: Graph, operator: Operator, outputs: int, position: int = 2) -> list[str]:
    """The reals of the bias, [outputs], the input at `position`; an empty list if it is absent."""
    if len(operator.inputs) <= position or operator.inputs[position] < 0:
        return []
    bias = graph.tensor(operator.inputs[position])
    if bias.data is None:
        raise UnsupportedModelError(
            f"{graph.file.path}: {operator}: expected a constant bias, found the tensor"
            f" {bias.name} that is computed"
        )
    if bias.shape != (outputs,):
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected a bias for each of {outputs} channels,"
            f" found {list(bias.shape)}"
        )
    if bias.type not in ("FLOAT32", "FLOAT16") and not (bias.quantized and bias.type == "INT32"):
        raise UnsupportedModelError(
            f"{graph.file.path}: {operator}: expected a bias of FLOAT32 or quantized INT32,"
            f" found {bias.type}"
        )
    return [graph.weight(bias.index, bias.data, 0)]

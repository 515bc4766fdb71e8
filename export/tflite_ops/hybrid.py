"""Hybrid operators: int8 weights, float inputs. tflite quantizes the input anew for each sample.

The reference kernel takes the largest magnitude of a sample as 127, rounds its values to integers,
adds up products of integers, and scales the sums: all of it in float32 here, where the integers
and (below 2^24) their sums are exact. One bit of difference before it can round a value to the
other integer, so what depthwise convolutions of reals between such operators add up is added in
the reference kernel's order, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from ...runtime.base.errors import UnsupportedModelError
from .file import Array, Operator, Tensor
from .graph import Graph

_LEVELS = np.array(127, np.float32)
# The kernel rounds halves away from zero, ONNX's Round to even integers. The float32 below 0.5:
# with 0.5 itself the number just below 0.5 would be rounded up.
_HALF = np.nextafter(np.array(0.5, np.float32), np.float32(0))
# A sample of zeros has no scale: this one keeps 0 / 0 out of the graph, and 127 / scale finite.
_LEAST = np.array(1e-30, np.float32)


def check_symmetric(graph: Graph, operator: Operator, weights: Tensor) -> None:
    """Refuses the kernels that quantize their input with a zero point."""
    q = weights.quantization
    assert q is not None
    symmetric = q.per_tensor and not q.zero_point.any()
    if not symmetric or operator.options.get("AsymmetricQuantizeInputs"):
        raise UnsupportedModelError(
            f"{graph.file.path}: {operator}: a hybrid operator with scales for each channel or"
            " asymmetric inputs is not reproduced: convert it with hybrid=float"
        )


def multiply(
    graph: Graph,
    operator: Operator,
    kind: str,
    *,
    weights: Array,
    source: str,
    bias: list[str],
    **attributes: Any,
) -> str:
    """A Conv or Gemm of int8 `weights`; returns the name of the sums with the bias added.

    source: reals, [N, C, H, W] or [N, C]; each sample n has a scale of its own.
    """
    tensor = graph.tensor(operator.inputs[1])
    assert tensor.quantization is not None
    axes = [1, 2, 3] if kind == "Conv" else [1]
    magnitude = graph.node("Abs", [source])
    largest = graph.node("ReduceMax", [magnitude], axes=axes, keepdims=1)
    largest = graph.node("Max", [largest, graph.shared(_LEAST)])
    levels = graph.shared(_LEVELS)
    steps = graph.node("Div", [levels, largest])  # steps per real; the kernel multiplies by it
    raised = graph.node("Add", [graph.node("Mul", [magnitude, steps]), graph.shared(_HALF)])
    integers = graph.node("Mul", [graph.node("Floor", [raised]), graph.node("Sign", [source])])
    stored = graph.arranged(tensor.index, weights)
    products = graph.node(
        kind, [integers, graph.node("Cast", [stored], to=TensorProto.FLOAT)], **attributes
    )
    scale = graph.shared(tensor.quantization.scale.reshape(()))
    unit = graph.node("Mul", [graph.node("Div", [largest, levels]), scale])
    sums = graph.node("Mul", [products, unit])
    if not bias:
        return sums
    if kind == "Conv":
        shape = graph.shared(np.array([1, -1, 1, 1], np.int64))
        bias = [graph.node("Reshape", [bias[0], shape])]
    return graph.node("Add", [sums, bias[0]])


def add_in_order(
    graph: Graph,
    operator: Operator,
    *,
    weights: Array,
    source: str,
    bias: list[str],
    found: dict[str, Any],
) -> str:
    """Sums a depthwise convolution in the reference kernel's order: taps, each product rounded.

    weights: float32 [channels, 1, height, width]; source: reals [N, channels, H, W]; found: from
    convolution.window. Returns the name of the sums [N, channels, OH, OW], bias added.
    """
    _, rows, columns, _ = graph.tensor(operator.outputs[0]).shape
    top, left, bottom, right = found["pads"]
    if any(found["pads"]):
        pads = np.array([0, 0, top, left, 0, 0, bottom, right], np.int64)
        zero = graph.shared(np.zeros((), np.float32))
        source = graph.node("Pad", [source, graph.shared(pads), zero])
    strides, dilations = found["strides"], found["dilations"]
    axes, steps = graph.shared(np.array([2, 3], np.int64)), graph.shared(np.array(strides))
    sums = ""
    for at in np.ndindex(*weights.shape[2:]):
        starts = np.array(at, np.int64) * dilations
        ends = starts + (np.array([rows, columns]) - 1) * strides + 1
        limits = [graph.shared(v) for v in (starts, ends)]
        tap = graph.shared(weights[None, :, 0, at[0], at[1], None, None])
        seen = graph.node("Slice", [source, *limits, axes, steps])
        product = graph.node("Mul", [seen, tap])
        sums = graph.node("Add", [sums, product]) if sums else product
    if not bias:
        return sums
    shape = graph.shared(np.array([1, -1, 1, 1], np.int64))
    return graph.node("Add", [sums, graph.node("Reshape", [bias[0], shape])])

"""Operators that treat all elements alike, in any layout of their inputs."""

from __future__ import annotations

import numpy as np

from ...runtime.base.errors import UnsupportedModelError
from .file import Operator
from .graph import Graph

_BINARY = {
    "ADD": "Add",
    "DIV": "Div",
    "MAXIMUM": "Max",
    "MINIMUM": "Min",
    "MUL": "Mul",
    "SUB": "Sub",
}
_UNARY = {
    "ABS": "Abs",
    "CEIL": "Ceil",
    "COS": "Cos",
    "ELU": "Elu",
    "EXP": "Exp",
    "FLOOR": "Floor",
    "HARD_SWISH": "HardSwish",
    "LOG": "Log",
    "LOGISTIC": "Sigmoid",
    "NEG": "Neg",
    "RELU": "Relu",
    "SIN": "Sin",
    "SQRT": "Sqrt",
    "TANH": "Tanh",
}
_CLIPS = {"RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0)}


def binary(graph: Graph, operator: Operator) -> None:
    """Adds ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM, with numpy's broadcasting."""
    layout = graph.common_layout(operator)
    operands = [graph.real(i, layout) for i in operator.inputs]
    activation = operator.options.get("FusedActivationFunction", 0)
    graph.finish_real(operator, layout, _BINARY[operator.name], *operands, activation=activation)


def unary(graph: Graph, operator: Operator) -> None:
    """Adds functions that ONNX has, too."""
    layout = graph.common_layout(operator)
    graph.finish_real(
        operator, layout, _UNARY[operator.name], graph.real(operator.inputs[0], layout)
    )


def logistic(graph: Graph, operator: Operator) -> None:
    """Adds 1 / (1 + exp(-x)).

    onnxruntime's Sigmoid has an absolute error of about 1e-8, whatever the value: enough for a
    factor inside a net. An output of the net may be a small probability, and is computed by the
    formula.
    """
    index = operator.outputs[0]
    readers = [o.name for o in graph.file.operators if index in o.inputs]
    factor = index not in graph.file.outputs and set(readers) == {"MUL"}
    if factor or graph.tensor(index).quantized:
        unary(graph, operator)
        return
    layout = graph.common_layout(operator)
    one = graph.shared(np.array(1, np.float32))
    power = graph.node("Exp", [graph.node("Neg", [graph.real(operator.inputs[0], layout)])])
    graph.finish_real(operator, layout, "Reciprocal", graph.node("Add", [power, one]))


def clip(graph: Graph, operator: Operator) -> None:
    """Adds RELU6, RELU_N1_TO_1."""
    layout = graph.common_layout(operator)
    bounds = [graph.shared(np.array(b, np.float32)) for b in _CLIPS[operator.name]]
    graph.finish_real(operator, layout, "Clip", graph.real(operator.inputs[0], layout), *bounds)


def leaky_relu(graph: Graph, operator: Operator) -> None:
    """Adds x if it is positive, else alpha x."""
    layout = graph.common_layout(operator)
    real = graph.real(operator.inputs[0], layout)
    graph.finish_real(operator, layout, "LeakyRelu", real, alpha=float(operator.options["Alpha"]))


def prelu(graph: Graph, operator: Operator) -> None:
    """Adds x if it is positive, else x times the second input, mostly a factor for each channel."""
    layout = graph.common_layout(operator)
    real, factors = (graph.real(i, layout) for i in operator.inputs)
    graph.finish_real(operator, layout, "PRelu", real, factors)


def square(graph: Graph, operator: Operator) -> None:
    """Adds x times itself."""
    layout = graph.common_layout(operator)
    real = graph.real(operator.inputs[0], layout)
    graph.finish_real(operator, layout, "Mul", real, real)


def reciprocal_root(graph: Graph, operator: Operator) -> None:
    """Adds one over the square root."""
    layout = graph.common_layout(operator)
    root = graph.node("Sqrt", [graph.real(operator.inputs[0], layout)])
    graph.finish_real(operator, layout, "Reciprocal", root)


def softmax(graph: Graph, operator: Operator) -> None:
    """Adds exp(beta x) over the last dimension (the channels), normalised."""
    real, beta = graph.real(operator.inputs[0]), float(operator.options["Beta"])
    if beta != 1.0:
        real = graph.node("Mul", [real, graph.shared(np.array(beta, np.float32))])
    graph.finish_real(operator, "file", "Softmax", real, axis=-1)


def quantize(graph: Graph, operator: Operator) -> None:
    """Converts reals, or integers of other scales, to the output's integers."""
    _copy(graph, operator, to_integers=True)


def dequantize(graph: Graph, operator: Operator) -> None:
    """Converts integers (or half precision) to reals."""
    _copy(graph, operator, to_integers=False)


def _copy(graph: Graph, operator: Operator, *, to_integers: bool) -> None:
    output = graph.tensor(operator.outputs[0])
    if output.quantized != to_integers:
        wanted = "integers with scales" if to_integers else "FLOAT32"
        raise UnsupportedModelError(
            f"{graph.file.path}: {operator}: expected {wanted} as output, found {output.type}"
        )
    layout = graph.common_layout(operator)
    graph.finish_real(operator, layout, "Identity", graph.real(operator.inputs[0], layout))

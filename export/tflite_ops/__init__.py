"""tflite operators in ONNX: one function each, listed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import convolution, elementwise, pooling, shapes
from .file import Operator
from .graph import Graph


@dataclass(frozen=True)
class Converter:
    """What adds an operator to the graph, and how many inputs the operator may have."""

    add: Callable[[Graph, Operator], None]
    fewest: int = 1
    most: int = 1


# Every operator that is converted. A new one: its function in the file that fits, one line here,
# and, where it has options, their fields in file.py.
CONVERTERS = {
    "ADD": Converter(elementwise.binary, 2, 2),
    "AVERAGE_POOL_2D": Converter(pooling.average_pool),
    "CONCATENATION": Converter(shapes.concatenation, 1, 1 << 16),
    "CONV_2D": Converter(convolution.conv_2d, 2, 3),
    "DEPTHWISE_CONV_2D": Converter(convolution.depthwise_conv_2d, 2, 3),
    "DEQUANTIZE": Converter(elementwise.dequantize),
    "EXPAND_DIMS": Converter(shapes.to_output_shape, 2, 2),
    "FULLY_CONNECTED": Converter(convolution.fully_connected, 2, 3),
    "HARD_SWISH": Converter(elementwise.unary),
    "LEAKY_RELU": Converter(elementwise.leaky_relu),
    "LOGISTIC": Converter(elementwise.unary),
    "MAXIMUM": Converter(elementwise.binary, 2, 2),
    "MAX_POOL_2D": Converter(pooling.max_pool),
    "MEAN": Converter(pooling.mean, 2, 2),
    "MINIMUM": Converter(elementwise.binary, 2, 2),
    "MUL": Converter(elementwise.binary, 2, 2),
    "PAD": Converter(shapes.pad, 2, 2),
    "PADV2": Converter(shapes.pad, 3, 3),
    "QUANTIZE": Converter(elementwise.quantize),
    "RELU": Converter(elementwise.unary),
    "RELU6": Converter(elementwise.clip),
    "RELU_N1_TO_1": Converter(elementwise.clip),
    "RESHAPE": Converter(shapes.reshape, 1, 2),
    "SOFTMAX": Converter(elementwise.softmax),
    "SQUEEZE": Converter(shapes.to_output_shape),
    "SUB": Converter(elementwise.binary, 2, 2),
    "TANH": Converter(elementwise.unary),
    "TRANSPOSE": Converter(shapes.transpose, 2, 2),
}

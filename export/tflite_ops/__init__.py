"""tflite operators in ONNX: one function each, listed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import (
    convolution,
    elementwise,
    landmarks,
    pooling,
    resize,
    shapes,
    slices,
    transposed,
)
from .file import Operator
from .graph import Graph

_MANY = 1 << 16


@dataclass(frozen=True)
class Converter:
    """A function that adds an operator to the graph, and the operator's input and output counts."""

    add: Callable[[Graph, Operator], None]
    fewest: int = 1
    most: int = 1
    outputs: range = range(1, 2)

    @property
    def required(self) -> int:
        """How many of the first inputs are required; all of them if any number may be given."""
        return self.most if self.most == _MANY else self.fewest


# Every operator that is converted. A new one needs a function in the file that fits, one line
# here, and, if it has options, their fields in options.py. (DENSIFY, and DEQUANTIZE of constants,
# are resolved before: see file.py.)
CONVERTERS = {
    "ABS": Converter(elementwise.unary),
    "ADD": Converter(elementwise.binary, 2, 2),
    "AVERAGE_POOL_2D": Converter(pooling.average_pool),
    "CEIL": Converter(elementwise.unary),
    "CONCATENATION": Converter(shapes.concatenation, 1, _MANY),
    "CONV_2D": Converter(convolution.conv_2d, 2, 3),
    "COS": Converter(elementwise.unary),
    "CUSTOM Convolution2DTransposeBias": Converter(transposed.with_bias, 3, 3),
    "CUSTOM Landmarks2TransformMatrix": Converter(landmarks.transform_matrix),
    "CUSTOM MaxPoolingWithArgmax2D": Converter(pooling.max_pool_argmax, outputs=range(2, 3)),
    "CUSTOM TransformLandmarks": Converter(landmarks.transform_landmarks, 2, 2),
    "CUSTOM TransformTensorBilinear": Converter(landmarks.transform_tensor, 2, 2),
    "DEPTH_TO_SPACE": Converter(resize.depth_to_space),
    "DEPTHWISE_CONV_2D": Converter(convolution.depthwise_conv_2d, 2, 3),
    "DEQUANTIZE": Converter(elementwise.dequantize),
    "DIV": Converter(elementwise.binary, 2, 2),
    "ELU": Converter(elementwise.unary),
    "EXP": Converter(elementwise.unary),
    "EXPAND_DIMS": Converter(shapes.to_output_shape, 2, 2),
    "FLOOR": Converter(elementwise.unary),
    "FULLY_CONNECTED": Converter(convolution.fully_connected, 2, 3),
    "GATHER": Converter(slices.gather, 2, 2),
    "HARD_SWISH": Converter(elementwise.unary),
    "LEAKY_RELU": Converter(elementwise.leaky_relu),
    "LOG": Converter(elementwise.unary),
    "LOGISTIC": Converter(elementwise.logistic),
    "MAXIMUM": Converter(elementwise.binary, 2, 2),
    "MAX_POOL_2D": Converter(pooling.max_pool),
    "MEAN": Converter(pooling.reduction, 2, 2),
    "MINIMUM": Converter(elementwise.binary, 2, 2),
    "MIRROR_PAD": Converter(shapes.mirror_pad, 2, 2),
    "MUL": Converter(elementwise.binary, 2, 2),
    "NEG": Converter(elementwise.unary),
    "PACK": Converter(slices.pack, 1, _MANY),
    "PAD": Converter(shapes.pad, 2, 2),
    "PADV2": Converter(shapes.pad, 3, 3),
    "PRELU": Converter(elementwise.prelu, 2, 2),
    "QUANTIZE": Converter(elementwise.quantize),
    "REDUCE_MAX": Converter(pooling.reduction, 2, 2),
    "REDUCE_MIN": Converter(pooling.reduction, 2, 2),
    "RELU": Converter(elementwise.unary),
    "RELU6": Converter(elementwise.clip),
    "RELU_N1_TO_1": Converter(elementwise.clip),
    "RESHAPE": Converter(shapes.reshape, 1, 2),
    "RESIZE_BILINEAR": Converter(resize.bilinear, 2, 2),
    "RESIZE_NEAREST_NEIGHBOR": Converter(resize.nearest, 2, 2),
    "RSQRT": Converter(elementwise.reciprocal_root),
    "SIN": Converter(elementwise.unary),
    "SLICE": Converter(slices.slice_, 3, 3),
    "SOFTMAX": Converter(elementwise.softmax),
    "SPACE_TO_DEPTH": Converter(resize.space_to_depth),
    "SPLIT": Converter(slices.split, 2, 2, range(1, _MANY)),
    "SPLIT_V": Converter(slices.split_v, 3, 3, range(1, _MANY)),
    "SQRT": Converter(elementwise.unary),
    "SQUARE": Converter(elementwise.square),
    "SQUEEZE": Converter(shapes.to_output_shape),
    "STRIDED_SLICE": Converter(slices.strided_slice, 4, 4),
    "SUB": Converter(elementwise.binary, 2, 2),
    "SUM": Converter(pooling.reduction, 2, 2),
    "TANH": Converter(elementwise.unary),
    "TRANSPOSE": Converter(shapes.transpose, 2, 2),
    "TRANSPOSE_CONV": Converter(transposed.transpose_conv, 3, 4),
    "UNPACK": Converter(slices.unpack, outputs=range(1, _MANY)),
}

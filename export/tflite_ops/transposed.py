"""TRANSPOSE_CONV, and MediaPipe's Convolution2DTransposeBias: convolutions that enlarge images."""

from __future__ import annotations

from ...runtime.base.errors import ModelFileError, UnsupportedModelError
from .convolution import SAME, bias_of, check_axis, constant_weights, shape_nhwc
from .file import Operator
from .graph import Graph


def transpose_conv(graph: Graph, operator: Operator) -> None:
    """Inputs: the output's shape, weights [out, height, width, in], the image, a bias.

    SAME pads like the convolution that would make the image from the output.
    """
    shape = graph.ints(operator, 0) or []
    if len(shape) != 4 or min(shape) < 1:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected a constant shape of four dimensions, found"
            f" {shape}"
        )
    weights = constant_weights(graph, operator, rank=4)
    strides = _strides(graph, operator)
    pads = []
    for size, k, stride in zip(shape[1:3], weights.shape[1:3], strides, strict=True):
        needed = 0
        if operator.options["Padding"] == SAME:
            needed = max((-(-size // stride) - 1) * stride + k - size, 0)
        pads.append(needed // 2)
    _transposed(graph, operator, image=2, bias=3, sizes=(shape[1], shape[2]), pads=pads)


def with_bias(graph: Graph, operator: Operator) -> None:
    """Inputs: the image, weights [out, height, width, in], a bias; the output's shape follows.

    Source: mediapipe/util/tflite/operations/transpose_conv_bias.cc.
    """
    weights = constant_weights(graph, operator, rank=4)
    _, height, width, _ = shape_nhwc(graph, operator, 0)
    sizes, pads = [], []
    for size, k, stride in zip(
        (height, width), weights.shape[1:3], _strides(graph, operator), strict=True
    ):
        padding = 0
        if operator.options["Padding"] == SAME:
            padding = max(0, k - (size - 1) % stride - 1)
        sizes.append(stride * (size - 1) + k - padding)
        pads.append(padding // 2)
    _transposed(graph, operator, image=0, bias=2, sizes=(sizes[0], sizes[1]), pads=pads)


def _strides(graph: Graph, operator: Operator) -> tuple[int, int]:
    strides = operator.options["StrideH"], operator.options["StrideW"]
    if min(strides) < 1:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected positive strides, found {strides}"
        )
    return strides


def _transposed(
    graph: Graph,
    operator: Operator,
    *,
    image: int,
    bias: int,
    sizes: tuple[int, int],
    pads: list[int],
) -> None:
    """Adds the output of height and width `sizes`; pads: rows above and columns before.

    image, bias: positions of these inputs. Weights -> [in, out, height, width].
    """
    weights = constant_weights(graph, operator, rank=4)
    source = graph.tensor(operator.inputs[image])
    assert weights.data is not None
    check_axis(graph, operator, weights, 0)
    outputs, *kernel, depth = weights.shape
    _, height, width, channels = shape_nhwc(graph, operator, image)
    if channels != depth:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected weights of {channels} input channels, found"
            f" {list(weights.shape)}"
        )
    hybrid = weights.quantized and not weights.folded and not source.quantized
    if hybrid and not graph.float_hybrids:
        raise UnsupportedModelError(
            f"{graph.file.path}: {operator}: a hybrid operator is not reproduced: convert it with"
            " hybrid=float"
        )
    strides, ends, more = _strides(graph, operator), [], []
    for size, wanted, k, stride, before in zip(
        (height, width), sizes, kernel, strides, pads, strict=True
    ):
        after = stride * (size - 1) + k - before - wanted
        ends.append(max(after, 0))
        more.append(max(-after, 0))
        if more[-1] >= stride or stride * (size - 1) + k <= before + ends[-1]:
            raise ModelFileError(
                f"{graph.file.path}: {operator}: expected an output that {size} and a stride of"
                f" {stride} make, found {wanted}"
            )
    data = weights.data.transpose(3, 0, 1, 2)
    operands = [graph.real(source.index, "nchw"), graph.weight(weights.index, data, 1)]
    operands += bias_of(graph, operator, outputs, bias)
    graph.finish_real(
        operator,
        "nchw",
        "ConvTranspose",
        *operands,
        activation=operator.options.get("FusedActivationFunction", 0),
        kernel_shape=list(kernel),
        strides=list(strides),
        pads=[*pads, *ends],
        output_padding=more,
    )

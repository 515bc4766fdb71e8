"""MediaPipe's operators on landmarks: a crop around some of them, and coordinate transformations.

Source: mediapipe/util/tflite/operations (landmarks_to_transform_matrix.cc, version 2;
transform_tensor_bilinear.cc; transform_landmarks.cc, version 2). A transformation is a [1, 4, 4]
matrix, of which rows and columns 0, 1 and 3 are used: pixels of the crop to those of the image.
"""

from __future__ import annotations

import numpy as np

from ...runtime.base.errors import ModelFileError, UnsupportedModelError
from .convolution import shape_nhwc
from .file import Operator
from .graph import Graph

_MATRIX = (1, 4, 4)


def transform_matrix(graph: Graph, operator: Operator) -> None:
    """Adds the matrix of a crop [output_height, output_width] around some landmarks [1, L, 3].

    The crop is the scaled bounding box of the landmarks, turned so that the line from the left
    to the right landmark has the target's angle.
    """
    _check_version(graph, operator, 2)
    options, source = operator.options, graph.tensor(operator.inputs[0])
    subset = options["subset_idxs"]
    used = [options["left_rotation_idx"], options["right_rotation_idx"], *subset]
    if source.rank != 3 or source.shape[0] != 1 or source.shape[2] != 3 or not subset:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected landmarks [1, L, 3] and some of them, found"
            f" {list(source.shape)} and {len(subset)}"
        )
    sizes = [options[k] for k in ("output_width", "output_height", "scale_x", "scale_y")]
    if min(used) < 0 or max(used) >= source.shape[1] or min(sizes) <= 0:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected landmarks below {source.shape[1]} and"
            f" positive sizes, found {min(used)} to {max(used)} and {sizes}"
        )
    width, height, scale_x, scale_y = sizes

    def number(value: float) -> str:
        return graph.shared(np.array(value, np.float32))

    def add(kind: str, *inputs: str) -> str:
        return graph.node(kind, inputs)

    def column(name: str, i: int) -> str:  # [1, n, 2] -> [1, n]
        return graph.node("Gather", [name, graph.shared(np.array(i, np.int64))], axis=2)

    landmarks = graph.real(source.index)
    ends = graph.shared(np.array(used[:2], np.int64))
    pair = graph.node("Gather", [landmarks, ends], axis=1)
    sides = []
    for i in (0, 1):  # from the left to the right landmark, [1, 1]
        both = column(pair, i)
        left, right = (
            graph.node("Gather", [both, graph.shared(np.array([k], np.int64))], axis=1)
            for k in (0, 1)
        )
        sides.append(add("Sub", right, left))
    across, down = sides
    length = add("Sqrt", add("Add", add("Mul", across, across), add("Mul", down, down)))
    nowhere = add("Equal", length, number(0))  # a line of no length has the angle 0
    divisor = add("Where", nowhere, number(1), length)
    cosine = add("Where", nowhere, number(1), add("Div", across, divisor))
    sine = add("Div", down, divisor)
    # The angle to turn by is the target's minus the line's.
    target = float(options["target_rotation_radians"])
    of_target = number(np.cos(target)), number(np.sin(target))
    c = add("Add", add("Mul", of_target[0], cosine), add("Mul", of_target[1], sine))
    s = add("Sub", add("Mul", of_target[1], cosine), add("Mul", of_target[0], sine))
    points = graph.node("Gather", [landmarks, graph.shared(np.array(subset, np.int64))], axis=1)
    x, y = column(points, 0), column(points, 1)
    turned = (
        add("Sub", add("Mul", c, x), add("Mul", s, y)),
        add("Add", add("Mul", s, x), add("Mul", c, y)),
    )
    middles, spans = [], []
    for name in turned:
        low = graph.node("ReduceMin", [name], axes=[1], keepdims=1)
        high = graph.node("ReduceMax", [name], axes=[1], keepdims=1)
        spans.append(add("Sub", high, low))
        middles.append(add("Mul", add("Add", low, high), number(0.5)))
    center = (
        add("Add", add("Mul", c, middles[0]), add("Mul", s, middles[1])),
        add("Sub", add("Mul", c, middles[1]), add("Mul", s, middles[0])),
    )
    step_x = add("Mul", spans[0], number(scale_x / width))
    step_y = add("Mul", spans[1], number(scale_y / height))
    rows = []
    for at, factors in zip(center, ((c, s), (add("Neg", s), c)), strict=True):
        first, second = add("Mul", factors[0], step_x), add("Mul", factors[1], step_y)
        right, below = add("Mul", first, number(width / 2)), add("Mul", second, number(height / 2))
        rows.append((first, second, add("Sub", at, add("Add", right, below))))
    zero, one = (graph.shared(np.full((1, 1), v, np.float32)) for v in (0, 1))
    (a, b, p), (d, e, q) = rows
    cells = [a, b, zero, p, d, e, zero, q, zero, zero, one, zero, zero, zero, zero, one]
    flat = graph.node("Concat", cells, axis=1)
    shape = graph.shared(np.array(_MATRIX, np.int64))
    graph.finish_real(operator, "file", "Reshape", flat, shape)


def transform_tensor(graph: Graph, operator: Operator) -> None:
    """Adds the crop of an image [1, H, W, C] by a matrix, bilinear; zero outside of the image.

    A pixel is a point in version 1, and has its center in the middle in version 2.
    """
    _check_version(graph, operator, 1, 2)
    _, height, width, _ = shape_nhwc(graph, operator, 0)
    rows, columns = operator.options["output_height"], operator.options["output_width"]
    output = graph.tensor(operator.outputs[0])
    _check_matrix(graph, operator)
    if output.rank != 4 or output.shape[1:3] != (rows, columns):
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected an output of {rows} x {columns}, found"
            f" {list(output.shape)}"
        )
    graph.check_count(operator, rows * columns)
    half = 0.5 if operator.version == 2 else 0.0
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32) + np.float32(half)
    pixels = np.stack([x, y, np.zeros_like(x), np.ones_like(x)]).reshape(4, -1)
    matrix = _rows(graph, operator, 2)
    at = graph.node("MatMul", [matrix, graph.shared(pixels)])  # [1, 2, rows * columns]
    if half:
        at = graph.node("Sub", [at, graph.shared(np.array(half, np.float32))])
    last = np.array([width - 1, height - 1], np.float32).reshape(1, 2, 1)
    zero = graph.shared(np.zeros((), np.float32))
    inside = graph.node("Clip", [at, zero])
    inside = graph.node("Min", [inside, graph.shared(last)])
    seen = graph.node("Cast", [graph.node("Equal", [inside, at])], to=1)
    seen = graph.node("ReduceMin", [seen], axes=[1], keepdims=1)
    shape = graph.shared(np.array([1, 1, rows, columns], np.int64))
    seen = graph.node("Reshape", [seen, shape])
    # GridSample's coordinates go from -1 to 1; an image of one pixel has no step between them.
    steps = graph.shared(2 / np.maximum(last, 1))
    one = graph.shared(np.array(1, np.float32))
    grid = graph.node("Sub", [graph.node("Mul", [inside, steps]), one])
    grid = graph.node("Transpose", [grid], perm=[0, 2, 1])
    grid = graph.node("Reshape", [grid, graph.shared(np.array([1, rows, columns, 2], np.int64))])
    crop = graph.node(
        "GridSample",
        [graph.real(operator.inputs[0], "nchw"), grid],
        align_corners=1,
        mode="bilinear",
        padding_mode="border",
    )
    graph.finish_real(operator, "nchw", "Mul", crop, seen)


def transform_landmarks(graph: Graph, operator: Operator) -> None:
    """Transforms x and y of landmarks [1, L, 2 or 3] by a matrix; z stays."""
    _check_version(graph, operator, 2)
    source = graph.tensor(operator.inputs[0])
    _check_matrix(graph, operator)
    if source.rank != 3 or source.shape[0] != 1 or source.shape[2] not in (2, 3):
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected landmarks [1, L, 2 or 3], found"
            f" {list(source.shape)}"
        )
    deep = source.shape[2]
    # The matrix's columns for x, y, z (which adds nothing) and 1.
    real, matrix = graph.real(source.index), _rows(graph, operator, 2)
    kept = graph.shared(np.array([0, 1], np.int64))
    turn = graph.node("Gather", [matrix, kept], axis=2)
    turn = graph.node("Transpose", [turn], perm=[0, 2, 1])
    shift = graph.node("Gather", [matrix, graph.shared(np.array([3], np.int64))], axis=2)
    shift = graph.node("Transpose", [shift], perm=[0, 2, 1])
    plane = graph.node("Gather", [real, kept], axis=2)
    moved = graph.node("MatMul", [plane, turn])
    if deep == 2:
        graph.finish_real(operator, "file", "Add", moved, shift)
        return
    moved = graph.node("Add", [moved, shift])
    z = graph.node("Gather", [real, graph.shared(np.array([2], np.int64))], axis=2)
    graph.finish_real(operator, "file", "Concat", moved, z, axis=2)


def _rows(graph: Graph, operator: Operator, count: int) -> str:
    """The first rows of the matrix, [1, count, 4]."""
    first = graph.shared(np.arange(count))
    return graph.node("Gather", [graph.real(operator.inputs[1]), first], axis=1)


def _check_matrix(graph: Graph, operator: Operator) -> None:
    shape, image = (graph.tensor(operator.inputs[i]).shape for i in (1, 0))
    if shape != _MATRIX or image[:1] != (1,):
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected one sample and a matrix {list(_MATRIX)},"
            f" found {list(image)} and {list(shape)}"
        )


def _check_version(graph: Graph, operator: Operator, *known: int) -> None:
    if operator.version not in known:
        raise UnsupportedModelError(
            f"{graph.file.path}: {operator}: expected version {' or '.join(map(str, known))}, found"
            f" {operator.version}"
        )

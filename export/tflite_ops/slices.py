"""STRIDED_SLICE, SLICE, SPLIT, SPLIT_V, UNPACK, PACK and GATHER: parts of tensors, as stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...runtime.base.errors import ModelFileError, UnsupportedModelError
from .file import MAX_RANK, Operator
from .graph import NHWC_TO_NCHW, Graph
from .shapes import move, reshape_to_output

# ONNX's ends for a dimension of any size.
_FIRST, _LAST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


def strided_slice(graph: Graph, operator: Operator) -> None:
    """Adds numpy's x[begin:end:stride, ...], given as three vectors and masks of their positions.

    A position of `NewAxisMask` adds a dimension, one of `EllipsisMask` stands for all dimensions
    that are not named, one of `ShrinkAxisMask` takes one index and drops the dimension.
    """
    source, options = graph.tensor(operator.inputs[0]), operator.options
    vectors = [graph.ints(operator, i) or [] for i in (1, 2, 3)]
    counts = {len(v) for v in vectors}
    if len(counts) != 1 or max(counts) > 2 * MAX_RANK or 0 in vectors[2]:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected begins, ends and steps of one length, and no"
            f" step of 0, found {vectors}"
        )
    ranges: list[tuple[int, int, int]] = []
    named = [i for i in range(max(counts)) if not _bit(options, "NewAxisMask", i)]
    ellipses = [i for i in named if _bit(options, "EllipsisMask", i)]
    left = source.rank - len(named) + len(ellipses)
    if left < 0 or len(ellipses) > 1:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected at most {source.rank} dimensions and one"
            f" ellipsis, found {len(named)} and {len(ellipses)}"
        )
    for i in named:
        if i in ellipses:
            ranges += [(0, _LAST, 1)] * left
        else:
            ranges.append(_range(options, i, vectors, source.shape[len(ranges)]))
    ranges += [(0, _LAST, 1)] * (source.rank - len(ranges))
    _slice(graph, operator, ranges)


def _bit(options: dict[str, int], mask: str, position: int) -> bool:
    return bool(options[mask] >> position & 1)


def _range(
    options: dict[str, int], i: int, vectors: list[list[int]], size: int
) -> tuple[int, int, int]:
    """The begin, end and step of ONNX's Slice for position i; size: -1 if it is free."""
    begin, end, step = (v[i] for v in vectors)
    if options["Offset"]:
        end += begin
    if _bit(options, "ShrinkAxisMask", i):
        index = 0 if _bit(options, "BeginMask", i) else begin
        return index, index + 1 if index != -1 else _LAST, 1
    if _bit(options, "BeginMask", i):
        begin = 0 if step > 0 else _LAST
    if _bit(options, "EndMask", i) or (step > 0 and 0 <= size <= end):
        end = _LAST if step > 0 else _FIRST
    return begin, end, step


def slice_(graph: Graph, operator: Operator) -> None:
    """Slices by begins and sizes; a size of -1 takes the rest."""
    source = graph.tensor(operator.inputs[0])
    begins, sizes = (graph.ints(operator, i) or [] for i in (1, 2))
    if len(begins) != source.rank or len(sizes) != source.rank or min([*begins, *sizes, 0]) < -1:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected {source.rank} begins and sizes, found"
            f" {begins} and {sizes}"
        )
    ranges = [(b, _LAST if n == -1 else b + n, 1) for b, n in zip(begins, sizes, strict=True)]
    _slice(graph, operator, ranges)


def split(graph: Graph, operator: Operator) -> None:
    """Splits into equal parts along a constant axis, which is the first input."""
    source = graph.tensor(operator.inputs[1])
    parts = len(operator.outputs)
    axis = _constant_axis(graph, operator, 0, source.rank)
    size = source.shape[axis]
    if size < 1 or size % parts or operator.options["NumSplits"] != parts:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected {parts} equal parts of {size}, found"
            f" {operator.options['NumSplits']}"
        )
    _parts(graph, operator, 1, axis, [size // parts] * parts)


def split_v(graph: Graph, operator: Operator) -> None:
    """Splits into parts of constant sizes, the second input; one may be -1 and takes the rest."""
    source = graph.tensor(operator.inputs[0])
    sizes = graph.ints(operator, 1) or []
    axis = _constant_axis(graph, operator, 2, source.rank)
    size = source.shape[axis]
    left = size - sum(n for n in sizes if n != -1)
    sizes = [left if n == -1 else n for n in sizes]
    counts = {len(operator.outputs), len(sizes), operator.options["NumSplits"]}
    if size < 1 or len(counts) != 1 or sum(sizes) != size or min(sizes) < 1:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected {len(operator.outputs)} parts of {size},"
            f" found {operator.options['NumSplits']} of sizes {sizes}"
        )
    _parts(graph, operator, 0, axis, sizes)


def unpack(graph: Graph, operator: Operator) -> None:
    """Adds one output for each index of an axis, without that dimension."""
    source = graph.tensor(operator.inputs[0])
    axis = _axis(graph, operator, operator.options["Axis"], source.rank)
    count = len(operator.outputs)
    if source.shape[axis] != count or operator.options["Num"] != count:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected {source.shape[axis]} outputs, found {count}"
        )
    _parts(graph, operator, 0, axis, [1] * count)


def pack(graph: Graph, operator: Operator) -> None:
    """Stacks inputs of one shape along a new axis; those of other scales are requantized."""
    tensors, output = [graph.tensor(i) for i in operator.inputs], graph.tensor(operator.outputs[0])
    axis = _axis(graph, operator, operator.options["Axis"], tensors[0].rank + 1)
    if operator.options["ValuesCount"] != len(tensors):
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected {len(tensors)} values, found"
            f" {operator.options['ValuesCount']}"
        )
    at, q = graph.shared(np.array([axis], np.int64)), output.quantization
    alike = all(t.type == output.type and (q is None or q.same(t.quantization)) for t in tensors)
    names = [graph.stored(t.index) if alike else graph.real(t.index) for t in tensors]
    rows = [graph.node("Unsqueeze", [name, at]) for name in names]
    if alike:
        move(graph, operator, "file", "Concat", *rows, axis=axis)
    else:
        graph.finish_real(operator, "file", "Concat", *rows, axis=axis)


def gather(graph: Graph, operator: Operator) -> None:
    """Gathers rows of the first input by the indices of the second."""
    source, indices = (graph.tensor(i) for i in operator.inputs)
    if operator.options["BatchDims"]:
        raise UnsupportedModelError(
            f"{graph.file.path}: {operator}: expected no batch dimensions, found"
            f" {operator.options['BatchDims']}"
        )
    if indices.type not in ("INT32", "INT64"):
        raise UnsupportedModelError(
            f"{graph.file.path}: {operator}: expected indices of INT32 or INT64, found"
            f" {indices.type}"
        )
    axis = _axis(graph, operator, operator.options["Axis"], source.rank)
    size, data = source.shape[axis], indices.data
    if data is not None and data.size and (data.min() < 0 or 0 <= size <= data.max()):
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected indices below {size}, found {data.min()} to"
            f" {data.max()}"
        )
    names = graph.stored(source.index), graph.stored(indices.index)
    move(graph, operator, "file", "Gather", *names, axis=axis)


def _constant_axis(graph: Graph, operator: Operator, position: int, rank: int) -> int:
    values = graph.ints(operator, position) or []
    if len(values) != 1:
        raise ModelFileError(f"{graph.file.path}: {operator}: expected one axis, found {values}")
    return _axis(graph, operator, values[0], rank)


def _axis(graph: Graph, operator: Operator, axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected an axis of {rank} dimensions, found {axis}"
        )
    return axis % rank


def _parts(
    graph: Graph, operator: Operator, position: int, axis: int, sizes: Sequence[int]
) -> None:
    """Adds an output for each part of input `position` along an axis, in order."""
    source, begin = operator.inputs[position], 0
    for output, size in zip(operator.outputs, sizes, strict=True):
        ranges = [(0, _LAST, 1)] * graph.tensor(source).rank
        ranges[axis] = (begin, begin + size, 1)
        begin += size
        _slice(graph, replace(operator, inputs=(source,), outputs=(output,)), ranges)


def _slice(graph: Graph, operator: Operator, ranges: Sequence[tuple[int, int, int]]) -> None:
    """Slices by the ranges (begin, end, step) of each dimension, to the output's shape."""
    source, output = graph.tensor(operator.inputs[0]), graph.tensor(operator.outputs[0])
    axes = [i for i, r in enumerate(ranges) if r != (0, _LAST, 1)]
    reshaped = source.rank != output.rank
    single = replace(operator, inputs=operator.inputs[:1])
    layout = "file" if reshaped or not axes else graph.common_layout(single)
    name = graph.stored(source.index, layout)
    inputs: list[str] = []
    if axes:
        order = list(NHWC_TO_NCHW if layout == "nchw" else range(source.rank))
        begins, ends, steps = ([ranges[i][k] for i in axes] for k in range(3))
        at = [order.index(i) for i in axes]
        inputs = [graph.shared(np.array(v, np.int64)) for v in (begins, ends, at, steps)]
    if reshaped:
        part = graph.node("Slice", [name, *inputs]) if axes else name
        reshape_to_output(graph, operator, part)
    elif axes:
        move(graph, operator, layout, "Slice", name, *inputs)
    else:
        move(graph, operator, layout, "Identity", name)

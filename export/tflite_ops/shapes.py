"""Operators that move elements and compute nothing: quantized tensors keep their integers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...runtime.base.errors import ModelFileError, UnsupportedModelError
from .convolution import flat_source
from .file import MAX_RANK, Operator
from .graph import NHWC_TO_NCHW, Graph, Layout


def reshape(graph: Graph, operator: Operator) -> None:
    """Adds a Reshape to a constant input or an option; one -1 in it takes the remaining size."""
    shape = graph.ints(operator, 1)
    if shape is None:
        shape = list(operator.options["NewShape"])
    _reshaped(graph, operator, shape)


def to_output_shape(graph: Graph, operator: Operator) -> None:
    """Adds SQUEEZE and EXPAND_DIMS, as a Reshape to the output's own shape."""
    _reshaped(graph, operator, list(graph.tensor(operator.outputs[0]).shape))


def _reshaped(graph: Graph, operator: Operator, shape: list[int]) -> None:
    output = graph.tensor(operator.outputs[0])
    if output.shape[:1] == (-1,) and -1 not in shape and len(shape) == output.rank:
        shape[0] = -1  # the batch stays free
    if len(shape) > MAX_RANK or shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected at most {MAX_RANK} positive dimensions, one"
            f" of them -1 at most, found {shape[: MAX_RANK + 1]}"
        )
    name = flat_source(graph, graph.tensor(operator.inputs[0]))
    move(graph, operator, "file", "Reshape", name, graph.shared(np.array(shape, np.int64)))


def reshape_to_output(graph: Graph, operator: Operator, name: str) -> None:
    """Reshapes the node output `name`, the input's stored values, to the shape of the output."""
    shape = np.array(graph.tensor(operator.outputs[0]).shape, np.int64)
    move(graph, operator, "file", "Reshape", name, graph.shared(shape))


def pad(graph: Graph, operator: Operator) -> None:
    """Adds PAD and PADV2: [rank, 2] constant amounts; the value is zero or a constant input."""
    source = graph.tensor(operator.inputs[0])
    amounts = graph.ints(operator, 1) or []
    if len(amounts) != 2 * source.rank or any(n < 0 for n in amounts):
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected {source.rank} pairs of padding, found"
            f" {amounts}"
        )
    pairs = [amounts[i : i + 2] for i in range(0, len(amounts), 2)]
    layout = graph.common_layout(operator)
    if layout == "nchw":
        pairs = [pairs[i] for i in NHWC_TO_NCHW]
    pads = np.array([p[0] for p in pairs] + [p[1] for p in pairs], np.int64)
    zero = np.zeros((), source.dtype)
    if source.quantization is not None:
        zero = source.quantization.zero_point[:1].astype(source.dtype).reshape(())
    value = graph.shared(zero)
    if len(operator.inputs) > 2 and operator.inputs[2] >= 0:
        filler = graph.tensor(operator.inputs[2])
        moved = _MOVES.get((filler.type, source.type), 0)
        alike = filler.dtype == source.dtype or bool(moved)
        if filler.data is None or filler.data.size != 1 or not alike:
            raise UnsupportedModelError(
                f"{graph.file.path}: {operator}: expected one constant of the input's type as"
                f" padding, found {list(filler.shape)} of {filler.type}"
            )
        q = filler.quantization
        if source.quantization and (q is None or not q.moved(source.quantization, moved)):
            raise UnsupportedModelError(
                f"{graph.file.path}: {operator}: expected padding with the input's scale"
            )
        stored = filler.data.reshape(()).astype(np.int64) + moved if moved else filler.data
        value = graph.shared(stored.reshape(()).astype(source.dtype))
    name = graph.stored(source.index, layout)
    move(graph, operator, layout, "Pad", name, graph.shared(pads), value)


_REFLECT = 0  # the schema's MirrorPadMode: REFLECT, SYMMETRIC


def mirror_pad(graph: Graph, operator: Operator) -> None:
    """Pads with mirrored borders, without the outermost elements (REFLECT) or with (SYMMETRIC)."""
    source = graph.tensor(operator.inputs[0])
    amounts = graph.ints(operator, 1) or []
    inner = operator.options["Mode"] == _REFLECT
    if len(amounts) != 2 * source.rank or min([*amounts, 0]) < 0:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected {source.rank} pairs of padding, found"
            f" {amounts}"
        )
    layout = graph.common_layout(replace(operator, inputs=operator.inputs[:1]))
    name, steps = graph.stored(source.index, layout), []
    for axis in range(source.rank):
        before, after = amounts[2 * axis : 2 * axis + 2]
        size = source.shape[axis]
        if not before and not after:
            continue
        if max(before, after) > size - inner:
            raise ModelFileError(
                f"{graph.file.path}: {operator}: expected padding within {size}, found {before} and"
                f" {after}"
            )
        graph.check_count(operator, size + before + after)
        rows = np.pad(np.arange(size), (before, after), mode="reflect" if inner else "symmetric")
        steps.append((graph.shared(rows), NHWC_TO_NCHW.index(axis) if layout == "nchw" else axis))
    for rows_name, axis in steps[:-1]:
        name = graph.node("Gather", [name, rows_name], axis=axis)
    if steps:
        move(graph, operator, layout, "Gather", name, steps[-1][0], axis=steps[-1][1])
    else:
        move(graph, operator, layout, "Identity", name)


def concatenation(graph: Graph, operator: Operator) -> None:
    """Concatenates; inputs whose scales differ from the output's are requantized."""
    output, axis = graph.tensor(operator.outputs[0]), int(operator.options["Axis"])
    if not -output.rank <= axis < output.rank:
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected an axis of {output.rank} dimensions, found"
            f" {axis}"
        )
    axis %= output.rank
    layout = graph.common_layout(operator)
    if layout == "nchw":
        axis = NHWC_TO_NCHW.index(axis)
    tensors = [graph.tensor(i) for i in operator.inputs]
    q = output.quantization
    alike = all(
        t.type == output.type and (q is None or not t.quantized or q.same(t.quantization))
        for t in tensors
    )
    activation = operator.options["FusedActivationFunction"]
    if alike and not activation:
        names = [graph.stored(t.index, layout) for t in tensors]
        move(graph, operator, layout, "Concat", *names, axis=axis)
    else:
        names = [graph.real(t.index, layout) for t in tensors]
        graph.finish_real(operator, layout, "Concat", *names, activation=activation, axis=axis)


def transpose(graph: Graph, operator: Operator) -> None:
    """Transposes the tensor, in the file's layout, by a constant permutation."""
    rank = graph.tensor(operator.inputs[0]).rank
    order = graph.ints(operator, 1) or []
    if sorted(order) != list(range(rank)):
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected an order of {rank} dimensions, found {order}"
        )
    move(graph, operator, "file", "Transpose", graph.stored(operator.inputs[0]), perm=order)


def move(
    graph: Graph, operator: Operator, layout: Layout, kind: str, *inputs: str, **attributes: Any
) -> None:
    """Adds a node on the stored values of the first input, whose scales the output must have."""
    source, output = graph.tensor(operator.inputs[0]), graph.tensor(operator.outputs[0])
    q, target = source.quantization, graph.name_of(output.index, layout)
    types = (source.type, output.type)
    if types in _MOVES and q is not None and q.moved(output.quantization, _MOVES[types]):
        # This is an input or output of the graph that is int8, while all between is uint8.
        moved = graph.node(kind, list(inputs), **attributes)
        real = graph.dequantized(moved, source)
        graph.finish_real(operator, layout, "Identity", real)
        return
    if source.type != output.type or not (q is None or q.same(output.quantization)):
        raise ModelFileError(
            f"{graph.file.path}: {operator}: expected type and scale of its input ({source.type})"
            f" in its output, found {output.type}"
        )
    graph.store(output.index, layout, graph.node(kind, list(inputs), target, **attributes))


_MOVES = {("INT8", "UINT8"): 128, ("UINT8", "INT8"): -128}

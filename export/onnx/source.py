"""Float ONNX models as the quantizer needs them: checked, of float32, without functions.

Half precision, model-local functions, constants in nodes and old operator sets are all ways to
write a float model that onnxruntime's quantizer passes over or turns into a file that does not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...runtime.base.errors import ModelFileError, UnsupportedModelError, one_line
from .exclusion import Exclusion, graphs

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_QDQ_OPSET = 13  # the first with scales for each channel
_DYNAMIC_OPSET = 11  # the first with DynamicQuantizeLinear
_TARGET_OPSET = 17
_INPUTS_APART = 4  # the first version of the format whose initializers need not be inputs, too
_UNKNOWN_TO_CHECKER = "No Op registered for"
# Types that DequantizeLinear turns into reals by a scale and a zero point, and of its scales.
_STORED = ("INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16", "INT32")
_SCALES = ("FLOAT", "FLOAT16", "BFLOAT16")
_MAX_BYTES = 2**31 - 1  # largest model in one file (protobuf)


@dataclass(frozen=True)
class Source:
    """model: float32 between its inputs and outputs. exclusion: the nodes of it that stay float."""

    model: onnx.ModelProto
    exclusion: Exclusion


def read(path: Path, patterns: Sequence[str]) -> Source:
    """The checked float model of a file, of an opset that has scales for each channel.

    patterns: node names or operator types that stay float, as named in the file.
    Raises ModelFileError, UnsupportedModelError; OptionError if a pattern fits nothing.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(str(path))
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as error:
        # onnxruntime has operators that the checker does not know. It loads the model next.
        if _UNKNOWN_TO_CHECKER not in str(error):
            raise ModelFileError(f"{path}: not a valid ONNX model: {one_line(error)}") from error
    if not model.graph.node:
        raise ModelFileError(f"{path}: expected an ONNX model, found one without operators")
    fits = Exclusion(model, patterns)
    if model.functions:
        model = _inlined(path, model)
        fits.inline(model)
    fits.complete()
    _lift_constants(model)
    _fold_weights(path, model)
    _check_float(path, model)
    fits.rename(_to_float32(model))
    _drop_weight_inputs(model)
    fits.freeze(model)
    return Source(_with_opset(path, model), fits)


def _check_float(path: Path, model: onnx.ModelProto) -> None:
    if quantized_types(model):
        raise UnsupportedModelError(
            f"{path}: expected a float model, found {quantized_types(model)[0]}: quantized already"
        )
    if _casts_weights(model):
        raise UnsupportedModelError(
            f"{path}: expected a float model, found int8 weights that it casts: a tflite model with"
            " hybrid operators is to be converted with --hybrid float first"
        )
    if model.ByteSize() > _MAX_BYTES:
        raise UnsupportedModelError(f"{path}: expected at most 2 GiB of weights")
    if not _finite(model):
        raise ModelFileError(f"{path}: expected finite weights, found NaN or infinity")


def _with_opset(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset >= _QDQ_OPSET:
        return model
    from onnx import version_converter

    try:
        return version_converter.convert_version(model, _TARGET_OPSET)
    except Exception as error:  # the checker raises RuntimeError, and types of its own
        if opset >= _DYNAMIC_OPSET:
            return model  # operators of other domains; the quantizer and the trial decide
        raise UnsupportedModelError(
            f"{path}: opset {opset} cannot be brought to {_TARGET_OPSET}: {one_line(error)}"
        ) from error


def _inlined(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without functions of its own, which the quantizer does not look into."""
    from onnx import inliner

    try:
        return inliner.inline_local_functions(model)
    except Exception as error:  # the C++ library behind it may raise anything
        raise UnsupportedModelError(
            f"{path}: its functions cannot be inlined: {one_line(error)}"
        ) from error


def _lift_constants(model: onnx.ModelProto) -> None:
    """Turns Constant nodes of the main graph into initializers: the quantizer looks only there."""
    from onnx import helper, numpy_helper

    kept = []
    for node in model.graph.node:
        values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            kept.append(node)
        elif "value" in values:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(values["value"])
            tensor.name = node.output[0]
        elif "value_float" in values or "value_floats" in values:
            found = np.array(next(iter(values.values())), np.float32)
            model.graph.initializer.append(numpy_helper.from_array(found, node.output[0]))
        elif "value_int" in values or "value_ints" in values:
            found = np.array(next(iter(values.values())), np.int64)
            model.graph.initializer.append(numpy_helper.from_array(found, node.output[0]))
        else:
            kept.append(node)  # strings and sparse tensors
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _fold_weights(path: Path, model: onnx.ModelProto) -> None:
    """Replaces DequantizeLinear of constants, weights that are stored as integers, by their reals.

    Raises ModelFileError if the scales do not fit the weights.
    """
    from onnx import helper, numpy_helper

    if any(n.op_type == "QuantizeLinear" for n in model.graph.node):
        return  # a QDQ file: its activations are quantized, too
    constants = {w.name: w for w in model.graph.initializer}
    kept, folded = [], []
    for node in model.graph.node:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        given = [constants[i] for i in node.input if i in constants]
        foldable = node.op_type == "DequantizeLinear" and not set(options) - {"axis"}
        if foldable and len(given) == sum(bool(i) for i in node.input) and _are_integers(given):
            what = f"{path}: DequantizeLinear of {given[0].name}"
            stored, scale, *zero = (numpy_helper.to_array(w) for w in given)
            reals = _reals(what, stored, scale, zero[0] if zero else None, options.get("axis", 1))
            folded.append(numpy_helper.from_array(reals, node.output[0]))
        else:
            kept.append(node)
    if folded:
        used = {i for n in kept for i in n.input}
        weights = [w for w in model.graph.initializer if w.name in used] + folded
        del model.graph.node[:], model.graph.initializer[:]
        model.graph.node.extend(kept)
        model.graph.initializer.extend(weights)


def _are_integers(given: Sequence[onnx.TensorProto]) -> bool:
    """Whether the inputs of a DequantizeLinear are integers and scales, not 8-bit floats."""
    from onnx import TensorProto

    types = [TensorProto.DataType.Name(w.data_type) for w in given]
    return len(types) in (2, 3) and types[0] in _STORED and types[1] in _SCALES


def _reals(what: str, stored: Array, scale: Array, zero: Array | None, axis: int) -> Array:
    """Computes (stored - zero) * scale, in the scale's type.

    scale: [], [1], or one for each index of `axis`; zero: the same shape. Source: DequantizeLinear
    of ONNX, as onnxruntime reads it: one scale has no axis.
    """
    rank = stored.ndim
    shape: list[int] = [1] * rank
    if scale.ndim > 1 or scale.size != 1:
        fits = scale.ndim == 1 and -rank <= axis < rank and stored.shape[axis] == scale.size
        if not fits:
            raise ModelFileError(
                f"{what}: expected a scale, or one for each index of an axis of"
                f" {list(stored.shape)}, found {list(scale.shape)} on axis {axis}"
            )
        shape[axis] = -1
    integers = stored.astype(np.int32)
    if zero is not None:
        if zero.ndim > 1 or zero.size != scale.size:
            raise ModelFileError(
                f"{what}: expected {scale.size} zero points, found {list(zero.shape)}"
            )
        integers -= zero.astype(np.int32).reshape(shape)
    reals: Array = integers.astype(scale.dtype)
    reals *= scale.reshape(shape)
    return reals


def _to_float32(model: onnx.ModelProto) -> dict[str, str]:
    """Turns half precision into single; inputs and outputs keep their type, with a Cast inside.

    The integer operators take float32 alone, and on a CPU half precision is computed in it anyway.
    Returns new names of tensors that had the names of outputs.
    """
    from onnx import TensorProto, helper

    half = TensorProto.FLOAT16
    ends = [*model.graph.input, *model.graph.output]
    if not any(_is_half(g) for g in graphs(model.graph)) and not any(
        v.type.tensor_type.elem_type == half for v in ends
    ):
        return {}
    constants = {w.name for w in model.graph.initializer}
    entering = [
        v.name
        for v in model.graph.input
        if v.type.tensor_type.elem_type == half and v.name not in constants
    ]
    leaving = [
        v.name
        for v in model.graph.output
        if v.type.tensor_type.elem_type == half and v.name not in entering
    ]
    for value in model.graph.input:
        if value.name in constants and value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for graph in graphs(model.graph):
        _single(graph, main=graph is model.graph)
    taken = _names(model)
    renamed = {name: _fresh(f"{name}:float32", taken) for name in (*entering, *leaving)}
    for graph in graphs(model.graph):
        for node in graph.node:
            node.input[:] = [renamed.get(i, i) for i in node.input]
            node.output[:] = [renamed.get(o, o) for o in node.output]
        for weight in graph.initializer:
            weight.name = renamed.get(weight.name, weight.name)
        for value in (*graph.value_info, *(graph.output if graph is not model.graph else ())):
            value.name = renamed.get(value.name, value.name)
    before = [
        helper.make_node("Cast", [n], [renamed[n]], name=renamed[n], to=TensorProto.FLOAT)
        for n in entering
    ]
    after = [helper.make_node("Cast", [renamed[n]], [n], name=n, to=half) for n in leaving]
    nodes = [*before, *model.graph.node, *after]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return {name: renamed[name] for name in leaving}


def _is_half(graph: onnx.GraphProto) -> bool:
    from onnx import TensorProto

    half = TensorProto.FLOAT16
    tensors = [a.t for n in graph.node for a in n.attribute if a.HasField("t")]
    casts = [a.i for n in graph.node for a in n.attribute if a.name in ("to", "dtype")]
    return half in casts or any(t.data_type == half for t in (*graph.initializer, *tensors))


def _single(graph: onnx.GraphProto, *, main: bool) -> None:
    """Replaces float16 by float32 in a graph's own tensors."""
    from onnx import TensorProto, numpy_helper

    half, single = TensorProto.FLOAT16, TensorProto.FLOAT

    def widen(tensor: Any) -> None:
        if tensor.data_type == half:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))

    for weight in graph.initializer:
        widen(weight)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                widen(attribute.t)
            elif attribute.name in ("to", "dtype") and attribute.i == half:
                attribute.i = single
    if main:  # shapes are inferred again
        del graph.value_info[:]
    for value in graph.value_info if main else (*graph.value_info, *graph.input, *graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = single


def _drop_weight_inputs(model: onnx.ModelProto) -> None:
    """Drops inputs named like weights: weights are constants, which an input would leave unused.

    Inputs of other kinds keep their defaults, if the format version has such.
    """
    from onnx import TensorProto

    old = model.ir_version < _INPUTS_APART
    weights = {
        w.name
        for w in model.graph.initializer
        if old or (w.data_type == TensorProto.FLOAT and len(w.dims) > 1)
    }
    kept = [v for v in model.graph.input if v.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.ir_version = max(model.ir_version, _INPUTS_APART)


def _names(model: onnx.ModelProto) -> set[str]:
    names: set[str] = set()
    for graph in graphs(model.graph):
        names.update(v.name for v in (*graph.input, *graph.output, *graph.initializer))
        for node in graph.node:
            names.update((*node.input, *node.output))
    return names


def _fresh(wanted: str, taken: set[str]) -> str:
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


def _finite(model: onnx.ModelProto) -> bool:
    from onnx import TensorProto, numpy_helper

    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    return all(
        bool(np.isfinite(numpy_helper.to_array(w)).all())
        for w in model.graph.initializer
        if w.data_type in kinds and len(w.dims) > 1  # masks of -inf are scalars and vectors
    )


def quantized_types(model: onnx.ModelProto) -> list[str]:
    """Types of the operators that are about integers, one for each operator."""
    prefixes = (
        "Quantize",
        "Dequantize",
        "DynamicQuantize",
        "QLinear",
        "MatMulInteger",
        "ConvInteger",
        "QAttention",
        "QGemm",
        "MatMulNBits",
    )
    return [n.op_type for n in model.graph.node if n.op_type.startswith(prefixes)]


def _casts_weights(model: onnx.ModelProto) -> bool:
    from onnx import TensorProto

    kinds = (TensorProto.INT8, TensorProto.UINT8)
    stored = {w.name for w in model.graph.initializer if w.data_type in kinds and len(w.dims) > 1}
    return any(n.op_type == "Cast" and n.input[0] in stored for n in model.graph.node)

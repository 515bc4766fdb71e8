"""Reading a tflite flatbuffer into plain, checked values: nothing here trusts the file.

Everything that the converters look at afterwards (indices, shapes, constants, scales, options) has
been checked once, in `read`, so that a hostile file ends in one clear error and never in a crash.
Source: the schema of TensorFlow Lite (schema.fbs, version 3), through the package `tflite`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime.base.errors import ModelFileError, OptionError, UnsupportedModelError
from ...runtime.files.whole_file import read_whole
from .options import Options
from .sparse import SparseTensor

Array = npt.NDArray[Any]

_IDENTIFIER = b"TFL3"
MAX_RANK = 8
_MAX_BYTES = 2**31 - 1  # largest flatbuffer: its offsets are 32 bits wide
_MAX_ROWS = 2**16  # most tensors, most operators: a hundred times what real files have
_MAX_NAME = 256  # bytes; the rest is cut
# Parts of a flatbuffer may overlap, so that a small file could stand for terabytes. Real files
# share only some constants.
_SHARED_VECTORS = 4  # bytes of all vectors, as a multiple of the file's size
_SHARED_CONSTANTS = 64
# Errors that Python's flatbuffers reader raises if an offset or a length points outside the file.
_READ_ERRORS = (
    struct.error,
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
)
_DTYPES: dict[str, np.dtype[Any]] = {
    "FLOAT32": np.dtype("<f4"),
    "FLOAT16": np.dtype("<f2"),
    "INT64": np.dtype("<i8"),
    "INT32": np.dtype("<i4"),
    "INT16": np.dtype("<i2"),
    "INT8": np.dtype("i1"),
    "UINT8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


@dataclass(frozen=True)
class Quantization:
    """real = scale * (stored - zero_point); one scale, or one for each index of `axis`."""

    scale: npt.NDArray[np.float32]  # [1] or [shape[axis]]
    zero_point: npt.NDArray[np.int64]  # same shape as scale
    axis: int

    @property
    def per_tensor(self) -> bool:
        """Whether one scale holds for the whole tensor."""
        return len(self.scale) == 1

    def same(self, other: Quantization | None) -> bool:
        """Whether equal stored values of both mean the same reals."""
        return self.moved(other, 0)

    def moved(self, other: Quantization | None, by: int) -> bool:
        """Whether stored values of this one plus `by` mean the same reals in the other."""
        return (
            other is not None
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point + by, other.zero_point)
            and (self.per_tensor or self.axis == other.axis)
        )


@dataclass(frozen=True)
class Tensor:
    """A tensor of the subgraph. shape: as stored; -1 in front if the batch is free."""

    index: int
    name: str
    shape: tuple[int, ...]
    type: str  # FLOAT32, INT8, ...
    quantization: Quantization | None
    data: Array | None  # [shape] if constant, else None
    folded: bool = False  # output of a constant's DEQUANTIZE: operators take its reals

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored values."""
        return _DTYPES[self.type]

    @property
    def quantized(self) -> bool:
        """Whether the stored integers stand for reals."""
        return self.quantization is not None and self.dtype.kind in "iu"


@dataclass(frozen=True)
class Operator:
    """A node. inputs: indices of tensors, -1 for an optional one that is absent."""

    index: int
    name: str  # CONV_2D, ...
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    version: int = 1

    def __str__(self) -> str:
        return f"operator {self.index} ({self.name})"


@dataclass(frozen=True)
class TfliteFile:
    """A checked file of one subgraph."""

    path: Path
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    description: str


def read(path: Path) -> TfliteFile:
    """Reads and checks a tflite file.

    Raises OptionError if the package `tflite` is missing, ModelFileError if the file is
    missing, truncated or contradicts itself, UnsupportedModelError if it is valid but holds
    what cannot be converted (several subgraphs, sparse or variable tensors, unknown types).
    """
    try:
        import tflite
    except ImportError as error:
        raise OptionError(
            "reading tflite needs the package tflite: pip install 'stoker[export]'"
        ) from error
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise ModelFileError(f"{path}: expected at most 2 GiB of tflite, found {size} bytes")
        data = read_whole(path, _MAX_BYTES)
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from error
    if len(data) < 8 or data[4:8] != _IDENTIFIER:
        raise ModelFileError(
            f"{path}: expected a tflite file (TFL3 at byte 4), found {data[4:8]!r}"
            f" in {len(data)} bytes"
        )
    try:
        return _Reader(path, data, tflite).file()
    except _READ_ERRORS as error:
        raise ModelFileError(
            f"{path}: a truncated or corrupt tflite file ({type(error).__name__}:"
            f" {' '.join(str(error).split())[:100]})"
        ) from error


class _Reader:
    def __init__(self, path: Path, data: bytes, schema: Any) -> None:
        self._path, self._data, self._schema = path, data, schema
        self._vectors_left = _SHARED_VECTORS * len(data)  # bytes
        self._constants_left = min(_SHARED_CONSTANTS * len(data), _MAX_BYTES)
        self._model = schema.Model.GetRootAs(data, 0)
        self._operator_names = _names(schema.BuiltinOperator)
        self._type_names = _names(schema.TensorType)
        self._options = Options(path, schema, self._charge)

    def file(self) -> TfliteFile:
        model = self._model
        if model.Version() != 3:
            raise ModelFileError(
                f"{self._path}: expected version 3 of the schema, found {model.Version()}"
            )
        if self._count(model.SubgraphsLength(), "subgraphs") != 1:
            raise UnsupportedModelError(
                f"{self._path}: expected one subgraph, found {model.SubgraphsLength()}"
            )
        graph = model.Subgraphs(0)
        self._count(model.BuffersLength(), "buffers")
        count = self._count(graph.TensorsLength(), "tensors")
        tensors = tuple(self._tensor(graph.Tensors(i), i) for i in range(count))
        inputs = self._indices(graph.InputsAsNumpy(), count, "the graph's inputs")
        outputs = self._indices(graph.OutputsAsNumpy(), count, "the graph's outputs")
        if not outputs:
            raise ModelFileError(f"{self._path}: expected an output, found none")
        operators = tuple(
            self._operator(graph.Operators(i), i, count)
            for i in range(self._count(graph.OperatorsLength(), "operators"))
        )
        description = _text(model.Description())
        file = TfliteFile(self._path, tensors, operators, inputs, outputs, description)
        self._check_order(file)
        return _with_constants(file)

    def _count(self, length: int, what: str) -> int:
        """Checks the length of a vector of offsets, four bytes each: it must fit the file."""
        if length * 4 > len(self._data):
            raise ModelFileError(f"{self._path}: {length} {what} in {len(self._data)} bytes")
        if length > _MAX_ROWS:
            raise UnsupportedModelError(
                f"{self._path}: expected at most {_MAX_ROWS} {what}, found {length}"
            )
        return int(length)

    def _vector(self, found: Any) -> Any:
        """A vector as numpy gives it; the schema's reader returns 0 where the file has none."""
        if isinstance(found, int):
            return ()
        self._charge(found.nbytes)
        return found

    def _charge(self, nbytes: int) -> None:
        self._vectors_left -= nbytes
        if self._vectors_left < 0:
            raise ModelFileError(f"{self._path}: a corrupt tflite file: its parts overlap")

    def _indices(self, found: Any, count: int, what: str, lowest: int = 0) -> tuple[int, ...]:
        indices = tuple(int(i) for i in self._vector(found))
        for i in indices:
            if not lowest <= i < count:
                raise ModelFileError(
                    f"{self._path}: {what}: expected tensors 0 to {count - 1}, found {i}"
                )
        return indices

    def _tensor(self, row: Any, index: int) -> Tensor:
        what = f"{self._path}: tensor {index}"
        kind = self._type_names.get(row.Type(), str(row.Type()))
        if kind not in _DTYPES:
            raise UnsupportedModelError(
                f"{what}: expected one of {', '.join(_DTYPES)}, found type {kind}"
            )
        if row.IsVariable():
            raise UnsupportedModelError(f"{what}: expected no state, found a variable tensor")
        shape = tuple(int(n) for n in self._vector(row.ShapeAsNumpy()))
        if len(shape) > MAX_RANK or any(n < 1 for n in shape):
            found = list(shape) if len(shape) <= MAX_RANK else len(shape)
            raise ModelFileError(
                f"{what}: expected at most {MAX_RANK} positive dimensions, found {found}"
            )
        buffer = row.Buffer()
        if buffer >= self._model.BuffersLength():
            raise ModelFileError(
                f"{what}: expected a buffer below {self._model.BuffersLength()}, found {buffer}"
            )
        stored, dtype = self._model.Buffers(buffer), _DTYPES[kind]
        if row.Sparsity() is None:
            data = self._constant(stored, shape, dtype, what)
        else:
            data = self._sparse(stored, row.Sparsity(), shape, dtype, what)
        signature = tuple(int(n) for n in self._vector(row.ShapeSignatureAsNumpy()))
        # Only the batch may be free: other free dimensions keep the size that the file gives.
        if data is None and signature and len(signature) == len(shape) and signature[0] == -1:
            shape = (-1, *shape[1:])
        stored_name = row.Name() or b""
        self._charge(len(stored_name))
        name = _text(stored_name) or f"tensor_{index}"
        return Tensor(index, name, shape, kind, self._quantization(row, shape, what), data)

    def _sparse(
        self,
        buffer: Any,
        row: Any,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        what: str,
    ) -> Array:
        """A constant whose file keeps only the non-zero values: [shape], with the zeros."""
        size = buffer.DataLength() // dtype.itemsize
        values = self._constant(buffer, (size,), dtype, what)
        if values is None:
            raise ModelFileError(f"{what}: expected the values of a sparse tensor, found none")
        self._constants_left -= dtype.itemsize * math.prod(shape)
        self._check_constants(what)
        return SparseTensor(row, self._schema, what, self._charge).dense(values, shape)

    def _constant(
        self, buffer: Any, shape: tuple[int, ...], dtype: np.dtype[Any], what: str
    ) -> Array | None:
        if buffer.Offset() > 1 or buffer.Size() > 1:
            raise UnsupportedModelError(f"{what}: its data lies outside the flatbuffer")
        if not buffer.DataLength():
            return None
        data = buffer.DataAsNumpy()
        expected = dtype.itemsize
        for n in shape:  # Python's integers, whose product cannot overflow
            expected *= n
        if data.nbytes != expected:
            raise ModelFileError(
                f"{what}: expected {expected} bytes for {list(shape)}, found {data.nbytes}"
            )
        self._constants_left -= expected
        self._check_constants(what)
        values: Array = np.frombuffer(data, dtype).reshape(shape)  # a view: nothing is copied
        if dtype.kind == "f" and not np.isfinite(values).all():
            raise ModelFileError(f"{what}: expected finite weights, found NaN or infinity")
        return values

    def _check_constants(self, what: str) -> None:
        if self._constants_left < 0:
            raise UnsupportedModelError(
                f"{what}: expected at most 2 GiB of constants, and {_SHARED_CONSTANTS} times the"
                " file's size"
            )

    def _quantization(self, row: Any, shape: tuple[int, ...], what: str) -> Quantization | None:
        found = row.Quantization()
        if found is None or not found.ScaleLength():
            return None
        if found.DetailsType():
            raise UnsupportedModelError(f"{what}: its quantization is of a custom or blocked kind")
        scale = np.array(self._vector(found.ScaleAsNumpy()), np.float32)
        zero = np.array(self._vector(found.ZeroPointAsNumpy()), np.int64)
        if not zero.size:
            zero = np.zeros(len(scale), np.int64)
        axis = int(found.QuantizedDimension())
        if len(scale) == 1:
            axis = 0
        elif not 0 <= axis < len(shape) or shape[axis] != len(scale):
            raise ModelFileError(
                f"{what}: expected a scale, or one for each index of an axis of {list(shape)},"
                f" found {len(scale)} on axis {axis}"
            )
        if len(zero) != len(scale):
            raise ModelFileError(f"{what}: expected {len(scale)} zero points, found {len(zero)}")
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ModelFileError(f"{what}: expected positive finite scales, found {scale.min()}")
        dtype = _DTYPES[self._type_names[row.Type()]]
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            if (zero < limits.min).any() or (zero > limits.max).any():
                raise ModelFileError(
                    f"{what}: expected zero points of {dtype.name}, found {zero.min()} to"
                    f" {zero.max()}"
                )
        return Quantization(scale, zero, axis)

    def _operator(self, row: Any, index: int, count: int) -> Operator:
        codes = self._model.OperatorCodesLength()
        if not 0 <= row.OpcodeIndex() < codes:
            raise ModelFileError(
                f"{self._path}: operator {index}: expected a code below {codes},"
                f" found {row.OpcodeIndex()}"
            )
        code = self._model.OperatorCodes(row.OpcodeIndex())
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        name = self._operator_names.get(number, f"builtin {number}")
        if name == "CUSTOM":
            name = f"CUSTOM {_text(code.CustomCode())}"
        what = f"operator {index} ({name})"
        return Operator(
            index,
            name,
            self._indices(row.InputsAsNumpy(), count, f"inputs of {what}", lowest=-1),
            self._indices(row.OutputsAsNumpy(), count, f"outputs of {what}"),
            self._options.read(row, name, what),
            int(code.Version()),
        )

    def _check_order(self, file: TfliteFile) -> None:
        """Checks that every tensor is made once, before its first use."""
        made = set(file.inputs) | {t.index for t in file.tensors if t.data is not None}
        for operator in file.operators:
            for i in operator.inputs:
                if i >= 0 and i not in made:
                    raise ModelFileError(
                        f"{file.path}: {operator} reads tensor {i} before it is made"
                    )
            for i in operator.outputs:
                if i in made:
                    raise ModelFileError(f"{file.path}: {operator} makes tensor {i} again")
                made.add(i)
        for i in file.outputs:
            if i not in made:
                raise ModelFileError(f"{file.path}: nothing makes the output, tensor {i}")


def _with_constants(file: TfliteFile) -> TfliteFile:
    """The file without DENSIFY and DEQUANTIZE of constants: their readers read the constants.

    Files use these for weights that are sparse, half precision, or int8 for float kernels.
    """
    tensors, operators = list(file.tensors), []
    for operator in file.operators:
        one = len(operator.inputs) == len(operator.outputs) == 1 and operator.inputs[0] >= 0
        if operator.name in ("DEQUANTIZE", "DENSIFY") and one:
            source, output = tensors[operator.inputs[0]], tensors[operator.outputs[0]]
            reals = operator.name == "DEQUANTIZE"
            known = not reals or source.quantized or source.type == "FLOAT16"
            if source.data is not None and known and output.index not in file.outputs:
                tensors[output.index] = replace(
                    source,
                    index=output.index,
                    name=output.name,
                    folded=reals or source.folded,
                )
                continue
        operators.append(operator)
    return replace(file, tensors=tuple(tensors), operators=tuple(operators))


def with_unsigned(file: TfliteFile) -> TfliteFile:
    """The file with uint8 in place of int8 between operators: values and zero points plus 128.

    The reals are the same. Inputs, outputs and constants stay int8.
    """
    kept = {*file.inputs, *file.outputs}
    tensors = list(file.tensors)
    for t in file.tensors:
        q = t.quantization
        if t.index not in kept and t.data is None and t.type == "INT8" and q is not None:
            moved = replace(q, zero_point=q.zero_point + 128)
            tensors[t.index] = replace(t, type="UINT8", quantization=moved)
    return replace(file, tensors=tuple(tensors))


def is_hybrid(file: TfliteFile, operator: Operator) -> bool:
    """Whether the operator has float inputs, and weights that are integers in its kernel."""
    if operator.name not in _PRODUCTS or len(operator.inputs) < 2 or min(operator.inputs[:2]) < 0:
        return False
    source, weights = (file.tensors[i] for i in operator.inputs[:2])
    return weights.quantized and not weights.folded and not source.quantized


def _names(constants: Any) -> dict[int, str]:
    return {v: k for k, v in vars(constants).items() if isinstance(v, int)}


def _text(found: bytes | None) -> str:
    """A name on one line of limited length, since errors quote it."""
    text = "" if found is None else found[:_MAX_NAME].decode("utf-8", "replace")
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)

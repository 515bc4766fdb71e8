"""An ONNX graph under construction: small initializers lie in the file, large ones beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

Array = npt.NDArray[Any]
Source = Callable[[], Iterator[tuple[int, Array]]]

MICROSOFT = "com.microsoft"
OPSET = 20
_MICROSOFT_OPSET = 1
_IR_VERSION = 9  # the version of opset 20
_INLINE = 1024  # bytes up to which an initializer lies in the model file itself
_PAGE = 4096  # bytes: tensors begin at multiples of it, so that they can be mapped


@dataclass(frozen=True)
class External:
    """An array in the data file. key: arrays of one key are stored once."""

    key: str
    dtype: np.dtype[Any]
    nbytes: int
    offset: int


class Graph:
    """Nodes and initializers; `name` is the node's or tensor's name in the file."""

    def __init__(self) -> None:
        self._nodes: list[NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._external: dict[str, External] = {}
        self._sources: list[tuple[Source, list[External]]] = []
        self._location: list[TensorProto] = []
        self._end = 0
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []

    @property
    def data_bytes(self) -> int:
        """Size of the data file."""
        return self._end

    @property
    def sources(self) -> list[tuple[Source, list[External]]]:
        """The sources of the data file's arrays, in order, each with the arrays that it makes.

        A source yields (index of the array, a piece of it), each array's pieces in order.
        """
        return self._sources

    # Nodes.

    def node(
        self, op: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: Any
    ) -> str:
        """Adds a node with one output; returns the output's name."""
        self.nodes(op, inputs, [output], domain=domain, **attributes)
        return output

    def nodes(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> None:
        """Adds a node with any number of outputs; "" for one that is left out."""
        from onnx import helper

        name = "/" + next(o for o in outputs if o)
        self._nodes.append(
            helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes)
        )

    def input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        """Declares an input of the model."""
        self.inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        """Declares an output of the model."""
        self.outputs.append(_value_info(name, dtype, shape))
        return name

    # Initializers.

    def constant(self, name: str, values: Array) -> str:
        """An initializer with known values; it goes into the data file if it is large."""
        if values.nbytes > _INLINE:
            spec = [(name, values.dtype, values.shape, name)]
            return self.stored(spec, lambda: iter([(0, values)]))[0]
        from onnx import numpy_helper

        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(values, name)
        return name

    def stored(
        self,
        arrays: Sequence[tuple[str, npt.DTypeLike, Sequence[int], str]],
        source: Source,
    ) -> list[str]:
        """Initializers in the data file, made by `source` when the file is written.

        arrays: (name, dtype, shape, key) of each. If all keys are known, the arrays are those
        already stored, perhaps under another name and shape.
        """
        made: list[External] = []
        for name, dtype, shape, key in arrays:
            kind = np.dtype(dtype)
            nbytes = kind.itemsize * int(np.prod(shape, dtype=np.int64))
            if key not in self._external:
                offset = -(-self._end // _PAGE) * _PAGE if nbytes >= _PAGE else self._end
                self._external[key] = External(key, kind, nbytes, offset)
                self._end = -(-(offset + nbytes) // 64) * 64
                made.append(self._external[key])
            found = self._external[key]
            assert (found.dtype, found.nbytes) == (kind, nbytes), name
            if name not in self._initializers:
                self._initializers[name] = self._reference(name, shape, found)
        if made:
            assert len(made) == len(arrays), "a source makes all of its arrays or none"
            self._sources.append((source, made))
        return [name for name, _, _, _ in arrays]

    def _reference(self, name: str, shape: Sequence[int], external: External) -> TensorProto:
        from onnx import TensorProto, helper

        tensor = TensorProto(
            name=name,
            dims=shape,
            data_type=helper.np_dtype_to_tensor_dtype(external.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        entries = {"offset": external.offset, "length": external.nbytes}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        self._location.append(tensor)
        return tensor

    def model(self, name: str, data_name: str, metadata: Mapping[str, str]) -> ModelProto:
        """The model, whose large initializers lie in the file `data_name` beside it."""
        from onnx import helper

        for tensor in self._location:
            tensor.external_data.add(key="location", value=data_name)
        graph = helper.make_graph(
            self._nodes, name, self.inputs, self.outputs, list(self._initializers.values())
        )
        model = helper.make_model(
            graph,
            producer_name="stoker",
            ir_version=_IR_VERSION,
            opset_imports=[
                helper.make_opsetid("", OPSET),
                helper.make_opsetid(MICROSOFT, _MICROSOFT_OPSET),
            ],
        )
        helper.set_model_props(model, dict(metadata))
        return model


def _value_info(name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> ValueInfoProto:
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, kind, list(shape))

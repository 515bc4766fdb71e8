"""The ONNX graph under construction: tflite tensors in either layout, stored or as reals.

tflite computes in NHWC, ONNX's convolutions in NCHW. Each tensor of rank 4 may exist in both; a
Transpose is added only where an operator needs the layout that is not there, so a chain of
convolutions has one at either end. A quantized tensor is stored as the file's own integers; its
reals are a DequantizeLinear away, and what makes it ends in a QuantizeLinear (QDQ): runtimes fuse
both with the operator between them into integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ...runtime.base.errors import ModelFileError, UnsupportedModelError
from .file import MAX_RANK, Array, Operator, Tensor, TfliteFile, is_hybrid

Layout = Literal["file", "nchw"]

OPSET = 17  # ONNX 1.12: every runtime of the last years reads it
IR_VERSION = 8
NHWC_TO_NCHW = (0, 3, 1, 2)
NCHW_TO_NHWC = (0, 2, 3, 1)

_ELEMENT = {
    "FLOAT32": TensorProto.FLOAT,
    "FLOAT16": TensorProto.FLOAT16,
    "INT64": TensorProto.INT64,
    "INT32": TensorProto.INT32,
    "INT16": TensorProto.INT16,
    "INT8": TensorProto.INT8,
    "UINT8": TensorProto.UINT8,
    "BOOL": TensorProto.BOOL,
}
_INNER_NAME = 48  # characters
_MAX_POSITIONS = 1 << 20  # largest constant that is computed from sizes: a crop of 1024 x 1024
_QUANTIZED_ACTIVATIONS = ("INT8", "UINT8")
# fused_activation_function: none, or the interval of reals that it clips to.
_NONE, _RELU, _RELU_N1_TO_1, _RELU6 = range(4)
_CLIPS = {_RELU: (0.0, np.inf), _RELU_N1_TO_1: (-1.0, 1.0), _RELU6: (0.0, 6.0)}


class Graph:
    """Nodes and constants of the ONNX model of one tflite file."""

    def __init__(self, file: TfliteFile, *, hybrid: str = "dynamic") -> None:
        """hybrid: "dynamic" or "float", as for `tflite.convert`."""
        self.file = file
        self.float_hybrids = hybrid == "float"
        self.hybrids = sum(is_hybrid(file, o) for o in file.operators)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._values: dict[tuple[int, Layout], str] = {}  # stored values that exist
        self._reals: dict[tuple[int, Layout], str] = {}  # dequantized values that exist
        self._taken: dict[str, int] = {}  # names, and the last number appended to each
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._arranged: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
        self._real_weights: dict[str, str] = {}
        self._scale_names: dict[int, tuple[str, str]] = {}
        self._nchw_names: dict[int, str] = {}
        ends = {*file.inputs, *file.outputs}  # these come first: they keep their names
        named = {i: self.fresh(file.tensors[i].name) for i in sorted(ends)}
        self._names = [named.get(t.index) or self.fresh(_inner_name(t)) for t in file.tensors]
        for i in file.inputs:
            self._values[i, "file"] = self._names[i]

    def tensor(self, index: int) -> Tensor:
        """The tensor of the file."""
        return self.file.tensors[index]

    # Reading of existing tensors.

    def made(self, index: int, layout: Layout) -> bool:
        """Whether the tensor exists in that layout without another transpose."""
        return (index, layout) in self._values and self.tensor(index).data is None

    def common_layout(self, operator: Operator) -> Layout:
        """The layout with the fewest transposes for an operator that computes elementwise."""
        variable = [i for i in operator.inputs if i >= 0 and self.tensor(i).data is None]
        if self.tensor(operator.outputs[0]).rank != 4 or not variable:
            return "file"
        if any(self.tensor(i).rank != 4 for i in variable):
            return "file"
        return "nchw" if any(self.made(i, "nchw") for i in variable) else "file"

    def stored(self, index: int, layout: Layout = "file") -> str:
        """The name of the tensor as it is stored: as integers if it is quantized."""
        if (index, layout) in self._values:
            return self._values[index, layout]
        tensor, name = self.tensor(index), self._layout_name(index, layout)
        if tensor.data is not None:
            if layout == "nchw" and tensor.quantization and not tensor.quantization.per_tensor:
                raise UnsupportedModelError(
                    f"{self.file.path}: tensor {index} ({tensor.name}): expected one scale,"
                    f" found {len(tensor.quantization.scale)}"
                )
            data = tensor.data if layout == "file" else channels_first(tensor.data)
            self.constant(name, data)
        else:
            order = NHWC_TO_NCHW if layout == "nchw" else NCHW_TO_NHWC
            source = self._values[index, "file" if layout == "nchw" else "nchw"]
            self.node("Transpose", [source], name, perm=order)
        self._values[index, layout] = name
        return name

    def real(self, index: int, layout: Layout = "file") -> str:
        """The name of the tensor as float32, dequantized if it is quantized."""
        if (index, layout) in self._reals:
            return self._reals[index, layout]
        tensor = self.tensor(index)
        name = self.stored(index, layout)
        if tensor.quantized:
            self._check_activation(tensor)
            name = self.dequantized(name, tensor)
        elif tensor.type == "FLOAT16":
            name = self.node("Cast", [name], to=TensorProto.FLOAT)
        elif tensor.type != "FLOAT32":
            raise UnsupportedModelError(
                f"{self.file.path}: tensor {index} ({tensor.name}): expected reals, found"
                f" {tensor.type} without scales"
            )
        self._reals[index, layout] = name
        return name

    def weight(self, index: int, data: Array, axis: int) -> str:
        """The reals of a constant in another arrangement: `data`, its scales along `axis`.

        Weights that are integers stay integers in the file, with a DequantizeLinear after them.
        """
        tensor, name = self.tensor(index), self.arranged(index, data)
        if name not in self._real_weights:
            real = name
            if tensor.quantized:
                real = self.dequantized(name, tensor, axis)
            elif tensor.type == "FLOAT16":
                real = self.node("Cast", [name], to=TensorProto.FLOAT)
            self._real_weights[name] = real
        return self._real_weights[name]

    def arranged(self, index: int, data: Array) -> str:
        """The name of a constant tensor in another arrangement, `data`, shared by its users."""
        key = index, data.shape, data.strides
        if key not in self._arranged:
            name = self.fresh(f"{self._names[index]}:weight")
            self._arranged[key] = self.constant(name, data)
        return self._arranged[key]

    def dequantized(self, name: str, tensor: Tensor, axis: int | None = None) -> str:
        """Adds a DequantizeLinear with the scales of `tensor` after the integers `name`."""
        inputs = [name, *self._scales(tensor)]
        attributes = self._axis(tensor, axis)
        return self.node("DequantizeLinear", inputs, self.fresh(f"{name}:real"), **attributes)

    def ints(self, operator: Operator, position: int) -> list[int] | None:
        """The values of a constant integer input, None if the operator has no such input."""
        if position >= len(operator.inputs) or operator.inputs[position] < 0:
            return None
        tensor = self.tensor(operator.inputs[position])
        if tensor.data is None or tensor.dtype.kind != "i":
            raise UnsupportedModelError(
                f"{self.file.path}: {operator}: expected a constant as input {position},"
                f" found tensor {tensor.index} of type {tensor.type}"
            )
        if tensor.data.size > 2 * MAX_RANK:
            raise ModelFileError(
                f"{self.file.path}: {operator}: expected at most {2 * MAX_RANK} values in input"
                f" {position}, found {tensor.data.size}"
            )
        return [int(n) for n in tensor.data.reshape(-1)]

    def check_count(self, operator: Operator, count: int) -> None:
        """Refuses a constant of too many positions before it is made: a file can claim any size."""
        if count > _MAX_POSITIONS:
            raise UnsupportedModelError(
                f"{self.file.path}: {operator}: expected at most {_MAX_POSITIONS} positions, found"
                f" {count}"
            )

    # Additions to the graph.

    def node(
        self, kind: str, inputs: Sequence[str], output: str | None = None, **attributes: Any
    ) -> str:
        """Adds a node of one output, and returns the output's name."""
        name = self.fresh(kind.lower()) if output is None else output
        self._nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def nodes(self, kind: str, inputs: Sequence[str], count: int, **attributes: Any) -> list[str]:
        """Adds a node of `count` outputs, and returns their names."""
        names = [self.fresh(kind.lower()) for _ in range(count)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, name=names[0], **attributes))
        return names

    def constant(self, name: str, data: Array) -> str:
        """Adds a constant; `name` must be new."""
        self._constants[name] = numpy_helper.from_array(np.asarray(data, order="C"), name)
        return name

    def shared(self, data: Array) -> str:
        """The name of a small constant, shared by all its users."""
        key = data.dtype.name, data.shape, data.tobytes()
        if key not in self._shared:
            shown = "_".join(str(v) for v in data.reshape(-1)[:16].tolist())
            self._shared[key] = self.constant(self.fresh(f"{data.dtype.name}:{shown}"), data)
        return self._shared[key]

    def store(self, index: int, layout: Layout, name: str) -> None:
        """Records that the node output `name` is the stored tensor."""
        self._values[index, layout] = name

    def name_of(self, index: int, layout: Layout) -> str:
        """The name that the tensor's maker gives it in that layout."""
        return self._layout_name(index, layout)

    def finish_real(
        self,
        operator: Operator,
        layout: Layout,
        kind: str,
        *inputs: str,
        activation: int = _NONE,
        **attributes: Any,
    ) -> None:
        """Adds a node of reals, its activation, and the conversion to the operator's output."""
        output = self.tensor(operator.outputs[0])
        target = self._layout_name(output.index, layout)
        after = self._activation_nodes(operator, output, activation)
        last = target if not output.quantized else None
        steps: list[tuple[str, list[str], dict[str, Any]]] = [(kind, list(inputs), attributes)]
        steps += [(k, ["", *more], {}) for k, more in after]
        name = ""
        if kind == "Identity" and output.quantized:
            name = steps.pop(0)[1][0]
        for i, (step, operands, options) in enumerate(steps):
            operands[0] = operands[0] or name
            name = self.node(step, operands, last if i + 1 == len(steps) else None, **options)
        if output.quantized:
            self._check_activation(output)
            self.node("QuantizeLinear", [name, *self._scales(output)], target, **self._axis(output))
        elif output.type != "FLOAT32":
            raise UnsupportedModelError(
                f"{self.file.path}: {operator}: expected float or quantized output, found"
                f" {output.type}"
            )
        self.store(output.index, layout, target)

    def _activation_nodes(
        self, operator: Operator, output: Tensor, activation: int
    ) -> list[tuple[str, list[str]]]:
        if activation == _NONE:
            return []
        if activation not in _CLIPS:
            # tflite's own kernels leave out TANH and SIGN_BIT.
            raise UnsupportedModelError(
                f"{self.file.path}: {operator}: expected a fused activation of none or a ReLU,"
                f" found {activation}"
            )
        low, high = _CLIPS[activation]
        if output.quantized and self._saturates(output, low, high):
            return []  # the range of the output's integers clips already
        if high == np.inf:
            return [("Relu", [])]
        bounds = [self.shared(np.array(bound, np.float32)) for bound in (low, high)]
        return [("Clip", bounds)]

    @staticmethod
    def _saturates(output: Tensor, low: float, high: float) -> bool:
        q, limits = output.quantization, np.iinfo(output.dtype)
        assert q is not None
        if not q.per_tensor:
            return False
        scale, zero = float(q.scale[0]), int(q.zero_point[0])
        lowest = np.rint(low / scale) + zero
        return bool(lowest <= limits.min and np.rint(high / scale) + zero >= limits.max)

    def _scales(self, tensor: Tensor) -> tuple[str, str]:
        q = tensor.quantization
        assert q is not None
        scale, zero = q.scale, q.zero_point.astype(tensor.dtype)
        if q.per_tensor:
            return self.shared(scale.reshape(())), self.shared(zero.reshape(()))
        if tensor.index not in self._scale_names:
            base = self._names[tensor.index]
            self._scale_names[tensor.index] = (
                self.constant(self.fresh(f"{base}:scale"), scale),
                self.constant(self.fresh(f"{base}:zero_point"), zero),
            )
        return self._scale_names[tensor.index]

    @staticmethod
    def _axis(tensor: Tensor, axis: int | None = None) -> dict[str, int]:
        q = tensor.quantization
        assert q is not None
        return {} if q.per_tensor else {"axis": q.axis if axis is None else axis}

    def _check_activation(self, tensor: Tensor) -> None:
        """Checks that quantized values between operators have 8 bits and one scale."""
        q = tensor.quantization
        assert q is not None
        if tensor.data is None and (tensor.type not in _QUANTIZED_ACTIVATIONS or not q.per_tensor):
            scales = "one scale" if q.per_tensor else f"{len(q.scale)} scales"
            raise UnsupportedModelError(
                f"{self.file.path}: tensor {tensor.index} ({tensor.name}): expected INT8 or UINT8"
                f" with one scale, found {tensor.type} with {scales}"
            )

    def fresh(self, wanted: str) -> str:
        """An unused name: `wanted`, or that with a number."""
        name = wanted
        while name in self._taken:
            self._taken[wanted] += 1
            name = f"{wanted}_{self._taken[wanted]}"
        self._taken[name] = 1
        return name

    def _layout_name(self, index: int, layout: Layout) -> str:
        if layout == "file":
            return self._names[index]
        tensor = self.tensor(index)
        if tensor.rank != 4 and (tensor.data is None or tensor.rank > 4):
            raise ModelFileError(
                f"{self.file.path}: tensor {index} ({tensor.name}): expected four dimensions,"
                f" found {list(tensor.shape)}"
            )
        if index not in self._nchw_names:
            self._nchw_names[index] = self.fresh(f"{self._names[index]}:nchw")
        return self._nchw_names[index]

    # The whole model.

    def model(self, producer_version: str) -> onnx.ModelProto:
        """The checked model. Raises ModelFileError if shapes contradict each other."""
        for i in self.file.outputs:
            if self.stored(i) != self._names[i] or i in self.file.inputs or self._is_constant(i):
                raise ModelFileError(
                    f"{self.file.path}: expected outputs that operators make, found tensor {i}"
                )
        inputs = [self._value_info(i) for i in self.file.inputs]
        outputs = [self._value_info(i) for i in self.file.outputs]
        graph = helper.make_graph(
            self._nodes,
            self.file.path.stem,
            inputs,
            outputs,
            list(self._constants.values()),
            doc_string=self.file.description or None,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="stoker",
            producer_version=producer_version,
        )
        self._check(model)
        return model

    def _is_constant(self, index: int) -> bool:
        return self.tensor(index).data is not None

    def _value_info(self, index: int) -> onnx.ValueInfoProto:
        tensor = self.tensor(index)
        shape = ["batch" if n < 0 else n for n in tensor.shape]
        return helper.make_tensor_value_info(self._names[index], _ELEMENT[tensor.type], shape)

    def _check(self, model: onnx.ModelProto) -> None:
        try:
            onnx.checker.check_model(model)
            inferred = onnx.shape_inference.infer_shapes(
                model, check_type=True, strict_mode=True, data_prop=True
            )
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            line = " ".join(str(error).split())
            raise ModelFileError(
                f"{self.file.path}: the operators contradict each other: {line[:300]}"
            ) from error
        shapes = {
            info.name: [
                d.dim_value if d.HasField("dim_value") else -1
                for d in info.type.tensor_type.shape.dim
            ]
            for info in (*inferred.graph.value_info, *inferred.graph.output)
        }
        for (index, layout), name in self._values.items():
            tensor, found = self.tensor(index), shapes.get(name)
            if found is None or tensor.data is not None:
                continue
            expected = list(tensor.shape)
            if layout == "nchw":
                expected = [expected[i] for i in NHWC_TO_NCHW]
            known = [(e, f) for e, f in zip(expected, found, strict=False) if e >= 0 and f >= 0]
            if len(expected) != len(found) or any(e != f for e, f in known):
                raise ModelFileError(
                    f"{self.file.path}: tensor {index} ({tensor.name}): expected {expected} as"
                    f" its operator makes it, found {found}"
                )


def _inner_name(tensor: Tensor) -> str:
    """A short name of an inner tensor: the first of the operators that were fused into its maker.

    TensorFlow's own name lists them all: in a small model, such names would be half of the file.
    """
    return tensor.name.split(";", 1)[0][-_INNER_NAME:]


def channels_first(data: Array) -> Array:
    """Transposes [.., H, W, C] constants of up to 4 dimensions to [N, C, H, W]."""
    moved: Array = data.reshape((1,) * (4 - data.ndim) + data.shape).transpose(NHWC_TO_NCHW)
    return moved

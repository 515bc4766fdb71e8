"""Small tflite models of every operator that is converted, written as flatbuffers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SAME, VALID = 0, 1
NONE, RELU, RELU_N1_TO_1, RELU6 = range(4)

# Versions of the operators that take int8, where it is not 2.
_INT8_VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 4, "RESHAPE": 1}
# Some options came with later versions, whatever the type; MediaPipe's say how pixels lie.
_VERSIONS = {
    "PRELU": 1,
    "RESIZE_BILINEAR": 3,
    "RESIZE_NEAREST_NEIGHBOR": 3,
    "TRANSPOSE_CONV": 3,
    "STRIDED_SLICE": 8,
    "CUSTOM TransformLandmarks": 2,
    "CUSTOM TransformTensorBilinear": 2,
    "CUSTOM Landmarks2TransformMatrix": 2,
}
_TYPES = {"float32": 0, "float16": 1, "int32": 2, "uint8": 3, "int64": 4, "int8": 9}


def noise(seed: str, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes of a hash, -128 to 127: the same on every machine and in every version of numpy."""
    count = int(np.prod(shape))
    data = hashlib.shake_128(seed.encode()).digest(count)
    return np.frombuffer(data, np.int8).reshape(shape)


def reals(seed: str, shape: tuple[int, ...], largest: float = 1.0) -> np.ndarray:
    return (noise(seed, shape) * np.float32(largest / 128)).astype(np.float32)


@dataclass
class TinyTflite:
    """A model in the making: tensors by index, operators in order."""

    tensors: list[dict[str, Any]] = field(default_factory=list)
    operators: list[tuple[str, list[int], list[int], dict[str, Any]]] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)

    def tensor(
        self,
        shape: tuple[int, ...],
        dtype: str = "float32",
        data: np.ndarray | None = None,
        *,
        scale: Any = None,
        zero: Any = 0,
        axis: int = 0,
        sparse: dict[str, Any] | None = None,
        free: bool = False,
    ) -> int:
        """sparse: order, blocks, and levels, each a size or (segments, indices), of `data` [count].
        free: the batch is.
        """
        name = f"t{len(self.tensors)}"
        scales = None if scale is None else np.atleast_1d(np.float32(scale))
        zeros = None if scales is None else np.broadcast_to(np.int64(zero), scales.shape)
        self.tensors.append(
            {
                "shape": shape,
                "dtype": dtype,
                "data": data,
                "scale": scales,
                "zero": zeros,
                "axis": axis,
                "name": name,
                "sparse": sparse,
                "free": free,
            }
        )
        return len(self.tensors) - 1

    def constant(self, data: np.ndarray, **quantization: Any) -> int:
        return self.tensor(data.shape, data.dtype.name, data, **quantization)

    def add(self, kind: str, inputs: list[int], output: int, **options: Any) -> int:
        self.operators.append((kind, inputs, [output], options))
        return output

    def add_many(
        self, kind: str, inputs: list[int], outputs: list[int], **options: Any
    ) -> list[int]:
        """An operator of several outputs."""
        self.operators.append((kind, inputs, outputs, options))
        return outputs

    def bytes(self) -> bytes:
        import flatbuffers
        import tflite as t

        b = flatbuffers.Builder(1024)

        def offsets(start: Any, items: list[int]) -> int:
            start(b, len(items))
            for item in reversed(items):
                b.PrependUOffsetTRelative(item)
            return int(b.EndVector())

        def ints(values: Any) -> int:
            return int(b.CreateNumpyVector(np.array(values, np.int32)))

        t.BufferStart(b)
        buffers = [t.BufferEnd(b)]
        tensors = []
        for row in self.tensors:
            index = 0
            if row["data"] is not None:
                raw = np.frombuffer(np.ascontiguousarray(row["data"]).tobytes(), np.uint8)
                data = b.CreateNumpyVector(raw)
                t.BufferStart(b)
                t.BufferAddData(b, data)
                index = len(buffers)
                buffers.append(t.BufferEnd(b))
            quantization = 0
            if row["scale"] is not None:
                scale = b.CreateNumpyVector(np.array(row["scale"], np.float32))
                zero = b.CreateNumpyVector(np.array(row["zero"], np.int64))
                t.QuantizationParametersStart(b)
                t.QuantizationParametersAddScale(b, scale)
                t.QuantizationParametersAddZeroPoint(b, zero)
                t.QuantizationParametersAddQuantizedDimension(b, row["axis"])
                quantization = t.QuantizationParametersEnd(b)
            name, shape = b.CreateString(row["name"]), ints(row["shape"])
            sparse = _sparsity(b, row["sparse"]) if row["sparse"] else 0
            signature = ints([-1, *row["shape"][1:]]) if row["free"] else 0
            t.TensorStart(b)
            if sparse:
                t.TensorAddSparsity(b, sparse)
            if signature:
                t.TensorAddShapeSignature(b, signature)
            t.TensorAddShape(b, shape)
            t.TensorAddType(b, _TYPES[row["dtype"]])
            t.TensorAddBuffer(b, index)
            t.TensorAddName(b, name)
            if quantization:
                t.TensorAddQuantization(b, quantization)
            tensors.append(t.TensorEnd(b))
        kinds = list(dict.fromkeys(kind for kind, *_ in self.operators))
        operators = []
        for kind, inputs, outputs, options in self.operators:
            table, table_type = 0, 0
            custom = options.get("custom", b"")
            raw = b.CreateByteVector(custom) if custom else 0
            for name, fields in options.items():  # {"Pool2DOptions": {"Padding": 0}}
                if name == "custom":
                    continue
                getattr(t, f"{name}Start")(b)
                for key, value in fields.items():
                    getattr(t, f"{name}Add{key}")(b, value)
                table, table_type = getattr(t, f"{name}End")(b), getattr(t.BuiltinOptions, name)
            ins, outs = ints(inputs), ints(outputs)
            t.OperatorStart(b)
            t.OperatorAddOpcodeIndex(b, kinds.index(kind))
            t.OperatorAddInputs(b, ins)
            t.OperatorAddOutputs(b, outs)
            if raw:
                t.OperatorAddCustomOptions(b, raw)
            if table:
                t.OperatorAddBuiltinOptionsType(b, table_type)
                t.OperatorAddBuiltinOptions(b, table)
            operators.append(t.OperatorEnd(b))
        integers = any(row["dtype"] == "int8" for row in self.tensors)
        codes = []
        for kind in kinds:
            number = getattr(t.BuiltinOperator, kind.split()[0])
            custom_code = b.CreateString(kind.split()[1]) if " " in kind else 0
            version = _INT8_VERSIONS.get(kind, 2) if integers else 1
            t.OperatorCodeStart(b)
            if custom_code:
                t.OperatorCodeAddCustomCode(b, custom_code)
            t.OperatorCodeAddDeprecatedBuiltinCode(b, min(number, 127))
            t.OperatorCodeAddBuiltinCode(b, number)
            version = self.versions.get(kind, _VERSIONS.get(kind, version))
            t.OperatorCodeAddVersion(b, version)
            codes.append(t.OperatorCodeEnd(b))
        tensor_rows = offsets(t.SubGraphStartTensorsVector, tensors)
        operator_rows = offsets(t.SubGraphStartOperatorsVector, operators)
        ins, outs = ints(self.inputs), ints(self.outputs)
        t.SubGraphStart(b)
        t.SubGraphAddTensors(b, tensor_rows)
        t.SubGraphAddInputs(b, ins)
        t.SubGraphAddOutputs(b, outs)
        t.SubGraphAddOperators(b, operator_rows)
        graph = t.SubGraphEnd(b)
        graphs = offsets(t.ModelStartSubgraphsVector, [graph])
        code_rows = offsets(t.ModelStartOperatorCodesVector, codes)
        buffer_rows = offsets(t.ModelStartBuffersVector, buffers)
        t.ModelStart(b)
        t.ModelAddVersion(b, 3)
        t.ModelAddOperatorCodes(b, code_rows)
        t.ModelAddSubgraphs(b, graphs)
        t.ModelAddBuffers(b, buffer_rows)
        b.Finish(t.ModelEnd(b), file_identifier=b"TFL3")
        return bytes(b.Output())


def _sparsity(b: Any, sparse: dict[str, Any]) -> int:
    """The table of a sparse tensor."""
    import tflite as t

    def vector(values: Any) -> tuple[int, int]:
        """Its type and its table; of int32 where numpy's type is none of the format's."""
        given = np.asarray(values)
        kind = {"uint8": "Uint8", "uint16": "Uint16"}.get(given.dtype.name, "Int32") + "Vector"
        data = b.CreateNumpyVector(given.astype(kind.removesuffix("Vector").lower()))
        getattr(t, f"{kind}Start")(b)
        getattr(t, f"{kind}AddValues")(b, data)
        return getattr(t.SparseIndexVector, kind), int(getattr(t, f"{kind}End")(b))

    levels = []
    for level in sparse["levels"]:
        vectors = [] if isinstance(level, int) else [vector(v) for v in level]
        t.DimensionMetadataStart(b)
        if isinstance(level, int):
            t.DimensionMetadataAddDenseSize(b, level)
        else:
            t.DimensionMetadataAddFormat(b, t.DimensionType.SPARSE_CSR)
            (segments_type, segments), (indices_type, indices) = vectors
            t.DimensionMetadataAddArraySegmentsType(b, segments_type)
            t.DimensionMetadataAddArraySegments(b, segments)
            t.DimensionMetadataAddArrayIndicesType(b, indices_type)
            t.DimensionMetadataAddArrayIndices(b, indices)
        levels.append(t.DimensionMetadataEnd(b))
    t.SparsityParametersStartDimMetadataVector(b, len(levels))
    for level in reversed(levels):
        b.PrependUOffsetTRelative(level)
    rows = b.EndVector()
    order = b.CreateNumpyVector(np.array(sparse["order"], np.int32))
    blocks = b.CreateNumpyVector(np.array(sparse["blocks"], np.int32))
    t.SparsityParametersStart(b)
    t.SparsityParametersAddTraversalOrder(b, order)
    t.SparsityParametersAddBlockMap(b, blocks)
    t.SparsityParametersAddDimMetadata(b, rows)
    return int(t.SparsityParametersEnd(b))


def conv(
    padding: int, stride: int = 1, dilation: int = 1, activation: int = NONE
) -> dict[str, Any]:
    return {
        "Conv2DOptions": {
            "Padding": padding,
            "StrideH": stride,
            "StrideW": stride,
            "DilationHFactor": dilation,
            "DilationWFactor": dilation,
            "FusedActivationFunction": activation,
        }
    }


def pool(padding: int, stride: int, size: int, activation: int = NONE) -> dict[str, Any]:
    return {
        "Pool2DOptions": {
            "Padding": padding,
            "StrideH": stride,
            "StrideW": stride,
            "FilterHeight": size,
            "FilterWidth": size,
            "FusedActivationFunction": activation,
        }
    }


def padding_and_windows() -> TinyTflite:
    """SAME with odd padding, dilation, depth multiplier, groups, pools, PAD and PADV2, MEAN."""
    m = TinyTflite()
    x = m.tensor((1, 9, 7, 3))
    m.inputs = [x]
    w = m.constant(reals("w1", (6, 3, 3, 3)))
    b = m.constant(reals("b1", (6,)))
    a = m.add("CONV_2D", [x, w, b], m.tensor((1, 5, 4, 6)), **conv(SAME, 2, 1, RELU6))
    w = m.constant(reals("w2", (4, 2, 2, 6)))
    c = m.add(
        "CONV_2D",
        [a, w, m.constant(reals("b2", (4,)))],
        m.tensor((1, 5, 4, 4)),
        **conv(SAME, 1, 2, RELU_N1_TO_1),
    )
    w = m.constant(reals("w3", (1, 3, 2, 8)))
    depthwise = {**conv(VALID, 1)["Conv2DOptions"], "DepthMultiplier": 2}
    d = m.add(
        "DEPTHWISE_CONV_2D",
        [c, w, m.constant(reals("b3", (8,)))],
        m.tensor((1, 3, 3, 8)),
        DepthwiseConv2DOptions=depthwise,
    )
    d = m.add(
        "PAD",
        [d, m.constant(np.array([[0, 0], [1, 0], [2, 1], [0, 0]], np.int32))],
        m.tensor((1, 4, 6, 8)),
    )
    e = m.add("MAX_POOL_2D", [d], m.tensor((1, 2, 3, 8)), **pool(SAME, 2, 3))
    f = m.add("AVERAGE_POOL_2D", [d], m.tensor((1, 2, 3, 8)), **pool(SAME, 2, 3, RELU))
    g = m.add(
        "CONCATENATION",
        [e, f],
        m.tensor((1, 2, 3, 16)),
        ConcatenationOptions={"Axis": -1, "FusedActivationFunction": NONE},
    )
    fill = m.constant(np.array(0.5, np.float32))
    g = m.add(
        "PADV2",
        [g, m.constant(np.array([[0, 0], [0, 1], [0, 0], [0, 0]], np.int32)), fill],
        m.tensor((1, 3, 3, 16)),
    )
    axes = m.constant(np.array([1, 2], np.int32))
    h = m.add("MEAN", [g, axes], m.tensor((1, 16)), ReducerOptions={"KeepDims": False})
    order = m.constant(np.array([0, 3, 1, 2], np.int32))
    t = m.add("TRANSPOSE", [g, order], m.tensor((1, 16, 3, 3)))
    rows = m.constant(np.array([-1], np.int32))
    k = m.add("MEAN", [t, rows], m.tensor((1, 16, 3, 1)), ReducerOptions={"KeepDims": True})
    m.outputs = [h, k]
    return m


def elementwise() -> TinyTflite:
    """Every operator on single elements, in NCHW after a convolution, with broadcasting."""
    m = TinyTflite()
    x = m.tensor((1, 4, 5, 3))
    m.inputs = [x]
    w = m.constant(reals("w", (6, 1, 1, 3), 4))
    a = m.add(
        "CONV_2D", [x, w, m.constant(reals("b", (6,)))], m.tensor((1, 4, 5, 6)), **conv(VALID)
    )
    shape = (1, 4, 5, 6)

    def unary(kind: str, source: int, **options: Any) -> int:
        return m.add(kind, [source], m.tensor(shape), **options)

    def binary(kind: str, left: int, right: int) -> int:
        options = {f"{kind.title()}Options": {"FusedActivationFunction": NONE}}
        if kind in ("MAXIMUM", "MINIMUM"):
            options = {"MaximumMinimumOptions": {}}
        return m.add(kind, [left, right], m.tensor(shape), **options)

    b = binary("MUL", a, m.constant(reals("per channel", (6,), 2)))
    b = binary("SUB", b, m.constant(reals("per row", (1, 4, 1, 1))))
    b = binary("ADD", b, unary("LOGISTIC", a))
    c = binary("MAXIMUM", b, unary("TANH", a))
    d = binary("MINIMUM", c, m.constant(np.array(1.5, np.float32)))
    e = binary(
        "ADD", unary("HARD_SWISH", a), unary("LEAKY_RELU", b, LeakyReluOptions={"Alpha": 0.3})
    )
    e = binary("ADD", e, unary("RELU", a))
    e = binary("MUL", e, unary("RELU6", a))
    e = binary("ADD", e, unary("RELU_N1_TO_1", d))
    s = m.add("SOFTMAX", [e], m.tensor(shape), SoftmaxOptions={"Beta": 0.7})
    flat = m.add("RESHAPE", [s, m.constant(np.array([-1, 30], np.int32))], m.tensor((4, 30)))
    w = m.constant(reals("dense", (5, 30)))
    y = m.add(
        "FULLY_CONNECTED",
        [flat, w, m.constant(reals("bias", (5,)))],
        m.tensor((4, 5)),
        FullyConnectedOptions={
            "FusedActivationFunction": RELU,
            "WeightsFormat": 0,
            "KeepNumDims": False,
        },
    )
    z = m.add("EXPAND_DIMS", [y, m.constant(np.array(1, np.int32))], m.tensor((4, 1, 5)))
    v = m.add("SQUEEZE", [z], m.tensor((4, 5)), SqueezeOptions={})
    half = m.constant(reals("half", (4, 5)).astype(np.float16))
    full = m.add("DEQUANTIZE", [half], m.tensor((4, 5)))
    v = m.add("ADD", [v, full], m.tensor((4, 5)), AddOptions={"FusedActivationFunction": NONE})
    m.outputs = [v, e]
    return m


def quantized() -> TinyTflite:
    """int8 from a float input to a float output; scales for each channel, other scales to join."""
    m = TinyTflite()
    x = m.tensor((1, 6, 6, 2))
    m.inputs = [x]

    def int8(shape: tuple[int, ...], scale: float, zero: int) -> int:
        return m.tensor(shape, "int8", scale=scale, zero=zero)

    q = m.add("QUANTIZE", [x], int8((1, 6, 6, 2), 0.016, 3))
    scales = np.array([0.01, 0.02, 0.005, 0.03], np.float32)
    w = m.constant(noise("q1", (4, 3, 3, 2)), scale=scales, axis=0)
    bias = m.constant(noise("q2", (4,)).astype(np.int32) * 8, scale=scales * np.float32(0.016))
    a = m.add("CONV_2D", [q, w, bias], int8((1, 3, 3, 4), 0.05, -128), **conv(SAME, 2, 1, RELU))
    w = m.constant(noise("q3", (1, 3, 3, 4)), scale=scales, axis=3)
    depthwise = {**conv(SAME, 1, 1, RELU6)["Conv2DOptions"], "DepthMultiplier": 1}
    bias = m.constant(np.zeros(4, np.int32), scale=scales * np.float32(0.05))
    b = m.add(
        "DEPTHWISE_CONV_2D",
        [a, w, bias],
        int8((1, 3, 3, 4), 0.06, -20),
        DepthwiseConv2DOptions=depthwise,
    )
    c = m.add(
        "ADD", [a, b], int8((1, 3, 3, 4), 0.09, -60), AddOptions={"FusedActivationFunction": NONE}
    )
    amounts = m.constant(np.array([[0, 0], [1, 0], [0, 1], [0, 0]], np.int32))
    d = m.add("PAD", [c, amounts], int8((1, 4, 4, 4), 0.09, -60))
    e = m.add("MAX_POOL_2D", [d], int8((1, 2, 2, 4), 0.09, -60), **pool(VALID, 2, 2))
    f = m.add("AVERAGE_POOL_2D", [d], int8((1, 2, 2, 4), 0.09, -60), **pool(VALID, 2, 2))
    e = m.add("QUANTIZE", [e], int8((1, 2, 2, 4), 0.1, 5))
    f = m.add("QUANTIZE", [f], int8((1, 2, 2, 4), 0.1, 5))
    g = m.add(
        "CONCATENATION",
        [e, f],
        int8((1, 2, 2, 8), 0.1, 5),
        ConcatenationOptions={"Axis": 3, "FusedActivationFunction": NONE},
    )
    h = m.add("RESHAPE", [g, m.constant(np.array([1, 32], np.int32))], int8((1, 32), 0.1, 5))
    w = m.constant(noise("q4", (3, 32)), scale=0.004)
    y = m.add(
        "FULLY_CONNECTED",
        [h, w],
        int8((1, 3), 0.2, 7),
        FullyConnectedOptions={
            "FusedActivationFunction": NONE,
            "WeightsFormat": 0,
            "KeepNumDims": False,
        },
    )
    m.outputs = [
        m.add("DEQUANTIZE", [y], m.tensor((1, 3))),
        m.add("DEQUANTIZE", [g], m.tensor((1, 2, 2, 8))),
    ]
    return m


# Name -> (model, largest input).
TINY = {
    "padding_and_windows": (padding_and_windows, 2.0),
    "elementwise": (elementwise, 1.0),
    "quantized": (quantized, 2.0),
}


# The shared models: shapes of their inputs, and the largest float input.
SHAPES = {"pretrainedResnet": (32, 32, 3), "kws": (49, 10, 1), "vww": (96, 96, 3), "ad01": (640,)}
FLOAT = {
    "pretrainedResnet": 255.0,
    "kws_ref_model_float32": 120.0,
    "vww_96_float": 1.0,
    "ad01_fp32": 40.0,
}
INT8 = ("pretrainedResnet_quant", "kws_ref_model_int8", "vww_96_int8", "ad01_int8")
SAMPLES = 3


def model_samples(name: str) -> list[np.ndarray]:
    """Inputs [1, ...] of a shared model: hashes, as pixels where it takes pixels."""
    shape = next(v for k, v in SHAPES.items() if name.startswith(k))
    samples = []
    for i in range(SAMPLES):
        data = noise(f"{name.split('_', 1)[0]} {i}", (1, *shape))
        if name not in FLOAT:
            samples.append(data)
        elif name in ("pretrainedResnet", "vww_96_float"):  # pixels are not negative
            samples.append((data.astype(np.float32) + 128) * np.float32(FLOAT[name] / 255))
        else:
            samples.append(data.astype(np.float32) * np.float32(FLOAT[name] / 128))
    return samples

"""Weights that ONNX files keep as integers: the reals that onnxruntime makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs onnx (stoker[export])")
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime (stoker[export])")
pytest.importorskip("onnxruntime.quantization", reason="needs onnxruntime (stoker[export])")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from stoker.export import onnx_quantize  # noqa: E402
from stoker.export.onnx import source as onnx_source  # noqa: E402
from stoker.runtime.base.errors import ModelFileError, UnsupportedModelError  # noqa: E402

Array = np.ndarray


def ints(dtype: Any, *shape: int) -> Array:
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(sum(shape))
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def scales(*shape: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(len(shape)).uniform(0.01, 0.2, shape).astype(dtype)


def net(path: Path, stored: Array, scale: Array, zero: Array | None, **options: Any) -> Path:
    """x + the reals of `stored`."""
    opset = options.pop("opset", 13)
    constants = {"stored": stored, "scale": scale} | ({} if zero is None else {"zero": zero})
    nodes = [
        helper.make_node("DequantizeLinear", list(constants), ["reals"], **options),
        helper.make_node("Add", ["x", "reals"], ["y"]),
    ]
    kind = helper.np_dtype_to_tensor_dtype(scale.dtype)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", kind, stored.shape)],
        [helper.make_tensor_value_info("y", kind, stored.shape)],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def reals_of(path: Path, model: Any) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    content = path.read_bytes() if model is None else model.SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    dtype = np.float16 if "16" in given.type else np.float32
    return np.asarray(session.run(None, {"x": np.zeros(given.shape, dtype)})[0])


I8, U8, I16, I32 = np.int8, np.uint8, np.int16, np.int32
FOLDED: dict[str, tuple[tuple[Array, Array, Array | None], dict[str, Any]]] = {
    "bias": ((ints(I32, 8), scales(1), None), {}),
    "bias with a zero point": ((ints(I32, 8), scales(1), np.zeros(1, I32)), {}),
    "bias, an axis of none": ((ints(I8, 8), scales(1), ints(I8, 1)), {"axis": 7}),
    "bias of many scales": ((ints(I8, 8), scales(8), ints(I8, 8)), {"axis": 0}),
    "tensor": ((ints(U8, 5, 4), scales(), ints(U8, 1).reshape(())), {}),
    "columns": ((ints(I8, 5, 4), scales(4), ints(I8, 4)), {}),
    "rows": ((ints(I8, 5, 4), scales(5), ints(I8, 5)), {"axis": 0}),
    "from the end": ((ints(U8, 5, 4, 3), scales(4), ints(U8, 4)), {"axis": -2}),
    "one row": ((ints(I8, 1, 4), scales(1), ints(I8, 1)), {"axis": 0}),
    "words": ((ints(I16, 5, 4), scales(4), ints(I16, 4)), {"opset": 21}),
    "half": ((ints(I8, 5, 4), scales(4, dtype=np.float16), ints(I8, 4)), {"opset": 21}),
}


@pytest.mark.parametrize("name", FOLDED)
def test_integer_weights_are_folded_as_onnxruntime_reads_them(name: str, tmp_path: Path) -> None:
    arrays, options = FOLDED[name]
    path = net(tmp_path / "net.onnx", *arrays, **options)
    model = onnx_source.read(path, []).model
    assert "DequantizeLinear" not in [n.op_type for n in model.graph.node]
    found, wanted = reals_of(path, model), reals_of(path, None)
    assert found.dtype == wanted.dtype
    assert np.array_equal(found, wanted)


REFUSED: dict[str, tuple[tuple[Array, Array, Array | None], dict[str, Any], str]] = {
    "a bias has no columns": (
        (ints(I8, 8), scales(8), None), {}, r"an axis of \[8\], found \[8\] on axis 1"),
    "no such axis": (
        (ints(I8, 5, 4), scales(4), None), {"axis": 2}, r"of \[5, 4\], found \[4\] on axis 2"),
    "before the first": (
        (ints(I8, 5, 4), scales(5), None), {"axis": -3}, r"found \[5\] on axis -3"),
    "another length": (
        (ints(I8, 5, 4), scales(5), None), {"axis": 1}, r"found \[5\] on axis 1"),
    "a matrix of scales": (
        (ints(I8, 5, 4), scales(5, 1), None), {"axis": 0}, r"found \[5, 1\] on axis 0"),
    "no scales": ((ints(I8, 5, 4), scales(0), None), {"axis": 0}, r"found \[0\] on axis 0"),
    "too few zero points": (
        (ints(I8, 5, 4), scales(5), ints(I8, 1)), {"axis": 0}, r"expected 5 zero points"),
    "too many zero points": (
        (ints(I8, 5, 4), scales(1), ints(I8, 4)), {}, r"expected 1 zero points, found \[4\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_scales_that_do_not_fit_are_named(name: str, tmp_path: Path) -> None:
    arrays, options, message = REFUSED[name]
    path = net(tmp_path / "net.onnx", *arrays, **options)
    with pytest.raises(ModelFileError, match=message) as caught:
        onnx_quantize.quantize(path, tmp_path / "out.onnx", static=False)
    assert str(caught.value).startswith(f"{path}: DequantizeLinear of stored: expected ")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_eight_bit_floats_are_no_integers(tmp_path: Path) -> None:
    """Such floats are not integers: they are left, and the model is refused."""
    path = net(tmp_path / "net.onnx", ints(I8, 5, 4), scales(1), None, opset=19)
    model = onnx.load(str(path))
    model.graph.initializer[0].data_type = TensorProto.FLOAT8E4M3FN
    onnx.save(model, str(path))
    with pytest.raises(
        UnsupportedModelError, match="expected a float model, found DequantizeLinear"
    ):
        onnx_source.read(path, [])

"""Every output of an int8 ONNX model is near the float one's, or named in a note."""

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

N, WIDTH, OUT = 64, 8, 5


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


W = rng(1).standard_normal((WIDTH, OUT)).astype(np.float32)
X = rng(2).standard_normal((N, WIDTH)).astype(np.float32)
Y = X @ W  # float32 of numpy: the reference of all tests


def save(path: Path, nodes: list[Any], outputs: list[str], **constants: np.ndarray) -> Path:
    def end(name: str, width: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])

    held = {"w": W, **constants}
    graph = helper.make_graph(
        nodes,
        "net",
        [end("x", WIDTH)],
        [end(name, OUT) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
    return path


def quantized(net: Path, tmp_path: Path, **options: Any) -> tuple[list[Any], tuple[str, ...]]:
    """The int8 model's outputs on X, and the notes."""
    np.save(tmp_path / "x.npy", X)
    made = onnx_quantize.quantize(
        net, tmp_path / "q.onnx", calibration=tmp_path / "x.npy", **options
    )
    session = ort.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X}), made.notes


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("kind", ["Relu", "Clip"])
def test_an_output_before_a_relu_keeps_its_range(
    kind: str, activations: str, tmp_path: Path
) -> None:
    constants = {"low": np.float32(-1), "high": np.float32(1)} if kind == "Clip" else {}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node(kind, ["y", *constants], ["z"]),
    ]
    held = {name: np.array(value) for name, value in constants.items()}
    net = save(tmp_path / "m.onnx", nodes, ["y", "z"], **held)
    (y, z), notes = quantized(net, tmp_path, activations=activations)
    assert error(y, Y) < 0.03
    assert error(z, np.clip(Y, -1, 1) if kind == "Clip" else np.maximum(Y, 0)) < 0.03
    assert notes == ()


def test_what_a_branch_reads_before_a_relu_keeps_its_range(tmp_path: Path) -> None:
    """The reader is in a graph within a node, which the quantizer does not search."""
    inner = helper.make_tensor_value_info("kept", TensorProto.FLOAT, None)
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Identity", ["y"], ["kept"])], name, [], [inner]
        )
        for name in ("then", "else")
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["some"]),
        helper.make_node("If", ["some"], ["same"], **branches),
        helper.make_node("MatMul", ["z", "v"], ["out"]),
    ]
    v = rng(3).standard_normal((OUT, OUT)).astype(np.float32)
    net = save(tmp_path / "m.onnx", nodes, ["same", "out"], v=v, zero=np.float32(0).reshape(()))
    (same, out), notes = quantized(net, tmp_path)
    assert error(same, Y) < 0.03
    assert error(out, np.maximum(Y, 0) @ v) < 0.03
    assert notes == ()


def test_an_output_that_is_far_off_is_named(tmp_path: Path) -> None:
    """One value of a thousand times the others takes all steps of the scale."""
    lone = np.eye(OUT, dtype=np.float32) * np.array([1e4, 1, 1, 1, 1], np.float32)
    rest = np.eye(OUT, dtype=np.float32) * np.array([0, 1, 1, 1, 1], np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["first"]),
        helper.make_node("MatMul", ["first", "lone"], ["wide"]),
        helper.make_node("MatMul", ["wide", "rest"], ["second"]),
    ]
    net = save(tmp_path / "m.onnx", nodes, ["first", "second"], lone=lone, rest=rest)
    (first, second), notes = quantized(net, tmp_path)
    expected = Y * np.array([0, 1, 1, 1, 1], np.float32)
    spread = float(np.linalg.norm(expected - expected.mean()))
    off = float(np.linalg.norm(second - expected)) / spread
    assert error(first, Y) < 0.03 and off > 0.3
    (note,) = notes
    assert note.startswith(
        f"output second is off by {off:.2f} of its spread (expected at most 0.3)"
    )

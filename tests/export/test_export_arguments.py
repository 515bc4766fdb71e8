"""Every argument that a caller passes to an export function is used or is an OptionError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stoker
from stoker.export import hf_to_gguf, hf_to_onnx, onnx_quantize, quantize, tflite, to_onnx
from stoker.runtime.base.errors import OptionError, StokerError
from tiny_models import make

WRONG: tuple[Any, ...] = (5, 2.5, b"x", object(), [5], {"a": 1}, "a\0b", "n" * 305, "\ud800")

FUNCTIONS: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "quantize-onnx": (onnx_quantize.quantize, "q.onnx", {"static": False}),
    "quantize": (quantize.quantize, "q.gguf", {"type": "Q8_0"}),
    "hf-to-gguf": (hf_to_gguf.convert, "q.gguf", {}),
    "hf-to-onnx": (hf_to_onnx.hf_to_onnx, "q.onnx", {}),
    "gguf-to-onnx": (to_onnx.gguf_to_onnx, "q.onnx", {}),
    "tflite": (tflite.convert, "q.onnx", {}),
}
ONNX = {"quantize-onnx", "hf-to-onnx", "gguf-to-onnx", "tflite"}


@pytest.fixture(autouse=True)
def within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # relative names must not leave files elsewhere


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_paths(name: str, wrong: Any, tmp_path: Path) -> None:
    if name in ONNX:
        pytest.importorskip("onnx", reason="needs onnx (stoker[export])")
        pytest.importorskip("onnxruntime", reason="needs onnxruntime (stoker[export])")
    call, out, options = FUNCTIONS[name]
    gguf = make(tmp_path / "m.gguf", "llama")
    before = sorted(tmp_path.iterdir())
    too_long = isinstance(wrong, str) and len(wrong) > 200
    with pytest.raises(StokerError if too_long else OptionError) as error:
        call(wrong, tmp_path / out, **options)
    one_line(error.value)
    with pytest.raises(OptionError) as error:
        call(gguf, wrong, **options)
    assert one_line(error.value).startswith(wrong if too_long else "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "option", "wrong"),
    [
        *(("quantize-onnx", "samples", v) for v in ("x", 0, 2.5, None)),
        *(("quantize-onnx", "threads", v) for v in ("x", -1, True)),
        *(("quantize-onnx", "exclude", v) for v in (5, [5], "Conv", None)),
        *(("quantize-onnx", key, 5) for key in ("calibration", "evaluation", "labels")),
        *(("quantize-onnx", key, 5) for key in ("method", "activations", "preprocessing")),
        *(("quantize-onnx", key, "no") for key in ("static", "per_channel", "force")),
        *(("quantize", "type", v) for v in (5, None, "Q5")),
        *(("quantize", "overrides", v) for v in (5, [5], [("a",)], [(1, 2)], "ab")),
        ("quantize", "imatrix", 5),
        ("quantize", "threads", "x"),
        *(("hf-to-gguf", key, 5) for key in ("type", "overrides", "pre", "force")),
        ("hf-to-gguf", "threads", 1.5),
        *(("gguf-to-onnx", key, "x") for key in ("type", "context", "force")),
        *(("hf-to-onnx", key, 5.5) for key in ("type", "context", "force", "through")),
        *(("tflite", key, 5) for key in ("evaluation", "force", "labels", "preprocessing")),
        *(("tflite", key, 5) for key in ("reference_kernels", "hybrid", "activations")),
        ("tflite", "threads", "x"),
    ],
)
def test_options(name: str, option: str, wrong: Any, tmp_path: Path) -> None:
    if name in ONNX:
        pytest.importorskip("onnx", reason="needs onnx (stoker[export])")
        pytest.importorskip("onnxruntime", reason="needs onnxruntime (stoker[export])")
    call, out, options = FUNCTIONS[name]
    gguf = make(tmp_path / "m.gguf", "llama")
    with pytest.raises(OptionError) as error:
        call(gguf, tmp_path / out, **{**options, option: wrong})
    assert option in one_line(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("inputs", [None, 5, "x", {5: 1}, {"x": [[1], [1, 2]]}, {"x": object()}])
def test_inputs_of_a_graph(inputs: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx (stoker[export])")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime (stoker[export])")
    ends = [
        onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, ["n", 2]) for end in "xy"
    ]
    relu = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([relu], "net", ends[:1], ends[1:])
    opset = [onnx.helper.make_opsetid("", 17)]
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
    model = stoker.load(path)
    with pytest.raises(StokerError) as error:
        model.run(inputs)
    assert type(error.value) is OptionError
    one_line(error.value)
    assert np.array_equal(model.run({"x": [[1, -1]]})["y"], [[1, 0]])

"""int8 ONNX models: their results, the table's figures, and inputs that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

onnx = pytest.importorskip("onnx", reason="needs onnx (stoker[export])")
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime (stoker[export])")
pytest.importorskip("onnxruntime.quantization", reason="needs onnxruntime (stoker[export])")
image = pytest.importorskip("PIL.Image", reason="needs pillow (stoker[export])")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from stoker.export import onnx_quantize  # noqa: E402
from stoker.runtime.base.errors import (  # noqa: E402
    DeviceError,
    ModelFileError,
    OptionError,
    UnsupportedModelError,
)
from stoker.runtime.cli.export.main import app  # noqa: E402

CLASSES = 4
SIDE = 12  # pixels


def weights(seed: int, *shape: int) -> np.ndarray:
    """Channels have very different sizes: one scale for all of them costs accuracy."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(0.02, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return (rng.normal(size=shape) * sizes).astype(np.float32)


def save(nodes: list[Any], constants: dict[str, np.ndarray], path: Path, **ends: Any) -> Path:
    graph = helper.make_graph(
        nodes,
        "net",
        ends["inputs"],
        ends["outputs"],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    opset = [helper.make_opsetid("", ends.get("opset", 17))]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
    return path


def convolutional(path: Path, *, opset: int = 17, broken: float | None = None) -> Path:
    """Maps images [batch, 3, 12, 12] of pixels to `CLASSES` probabilities."""
    constants = {
        "w1": weights(1, 16, 3, 3, 3),
        "w2": weights(2, 16, 16, 3, 3),
        "w3": weights(3, CLASSES, 16),
        "b1": np.linspace(-0.1, 0.1, 16, dtype=np.float32),
    }
    if broken is not None:
        constants["w2"][0, 0, 0, 0] = broken
    around = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], name="first", **around),
        helper.make_node("Relu", ["a"], ["b"], name="relu1"),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="second", strides=[2, 2], **around),
        helper.make_node("Relu", ["c"], ["d"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"], name="pool"),
        helper.make_node("Flatten", ["e"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3"], ["g"], name="classes", transB=1),
        helper.make_node("Softmax", ["g"], ["y"], name="softmax", axis=1),
    ]
    return save(
        nodes,
        constants,
        path,
        opset=opset,
        inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])],
    )


def encoder(path: Path) -> Path:
    """Maps tokens and mask [batch, positions] to states [.., 32]: one layer of attention."""
    d = 32
    constants = {k: weights(i, d, d) for i, k in enumerate(("wq", "wk", "wv", "wo"))}
    constants |= {"up": weights(7, d, 64), "down": weights(8, 64, d)}
    constants |= {"embedding": np.random.default_rng(9).normal(size=(50, d)).astype(np.float32)}
    constants |= {"gain": np.ones(d, np.float32), "one": np.array(1, np.float32)}
    constants |= {"axes": np.array([1], np.int64), "far": np.array(-1e4, np.float32)}

    def node(kind: str, inputs: str, output: str, **options: Any) -> Any:
        return helper.make_node(kind, inputs.split(), [output], name=output, **options)

    nodes = [
        node("Gather", "embedding tokens", "x"),
        node("MatMul", "x wq", "q"),
        node("MatMul", "x wk", "k"),
        node("MatMul", "x wv", "v"),
        node("Transpose", "k", "kt", perm=[0, 2, 1]),
        node("MatMul", "q kt", "scores"),
        node("Cast", "mask", "seen", to=TensorProto.FLOAT),
        node("Sub", "one seen", "hidden"),
        node("Mul", "hidden far", "away"),
        node("Unsqueeze", "away axes", "penalty"),
        node("Add", "scores penalty", "masked"),
        node("Softmax", "masked", "p", axis=-1),
        node("MatMul", "p v", "mixed"),
        node("MatMul", "mixed wo", "o"),
        node("Add", "x o", "r"),
        node("LayerNormalization", "r gain", "n"),
        node("MatMul", "n up", "u"),
        node("Relu", "u", "ur"),
        node("MatMul", "ur down", "dn"),
        node("Add", "n dn", "states"),
    ]
    ints = [helper.make_tensor_value_info(k, TensorProto.INT64, ["n", "t"]) for k in TOKENS]
    states = helper.make_tensor_value_info("states", TensorProto.FLOAT, ["n", "t", d])
    return save(nodes, constants, path, inputs=ints, outputs=[states])


TOKENS = ("tokens", "mask")


def run(path: Path, **inputs: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def kinds(path: Path) -> list[str]:
    return [n.op_type for n in onnx.load(str(path)).graph.node]


def weight_scales(path: Path) -> list[int]:
    """How many scales each int8 weight matrix of the model has."""
    model = onnx.load(str(path))
    constants = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    return [
        constants[n.input[1]].size
        for n in model.graph.node
        if n.op_type == "DequantizeLinear"
        and n.input[0] in constants
        and constants[n.input[0]].ndim > 1
    ]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convolutional(tmp_path_factory.mktemp("net") / "net.onnx")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, net: Path) -> Path:
    """Images in folders of the class that the float model predicts: its accuracy is 100%."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(5)
    for i in range(60):
        tint = rng.uniform(40, 215, 3)
        pixels = np.clip(rng.normal(tint, 30, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        x = (pixels.astype(np.float32) / np.float32(255)).transpose(2, 0, 1)[None]
        target = folder / f"class{int(run(net, x=x).argmax())}" / f"{i:03}.png"
        target.parent.mkdir(exist_ok=True)
        image.fromarray(pixels).save(target)
    return folder


def by_name(photos: Path, path: Path) -> Path:
    """A CSV of the classes that the folders' names end with."""
    rows = [f"{p.name},{p.parent.name[-1]}" for p in sorted(photos.rglob("*.png"))]
    path.write_text("\n".join(["name,class", *rows]) + "\n")
    return path


PIXELS = onnx_quantize.Preprocessing(scale=(1 / 255,))


@pytest.mark.parametrize("activations", onnx_quantize.ACTIVATIONS)
@pytest.mark.parametrize("method", onnx_quantize.METHODS)
def test_static_quantization_keeps_the_classes(
    method: str, activations: str, net: Path, photos: Path, tmp_path: Path
) -> None:
    out, labels = tmp_path / "net8.onnx", by_name(photos, tmp_path / "labels.csv")
    made = onnx_quantize.quantize(
        net,
        out,
        calibration=photos,
        labels=labels,
        preprocessing=PIXELS,
        method=method,
        activations=activations,
        reduce_range=activations == "uint8",  # no saturation on any processor
        samples=30,
    )
    assert made.before is not None
    assert made.after is not None
    assert made.before.accuracy == 1.0
    assert made.after.accuracy is not None
    assert made.after.accuracy >= 0.9
    assert made.after.accuracy == made.after.agreement
    assert made.after.relative_error is not None
    assert 0 < made.after.relative_error < 0.05
    assert made.before.samples == made.after.samples == 60
    assert out.stat().st_size == made.nbytes == made.after.nbytes
    found = kinds(out)
    assert found.count("QuantizeLinear") >= 4
    assert found.count("DequantizeLinear") >= found.count("QuantizeLinear")
    types = {
        TensorProto.DataType.Name(w.data_type)
        for w in onnx.load(str(out)).graph.initializer
        if "zero_point" in w.name and not w.dims
    }
    assert activations.upper() in types


def test_a_scale_for_each_channel_is_closer(net: Path, photos: Path, tmp_path: Path) -> None:
    errors = []
    for per_channel in (False, True):
        made = onnx_quantize.quantize(
            net,
            tmp_path / f"{per_channel}.onnx",
            calibration=photos,
            preprocessing=PIXELS,
            per_channel=per_channel,
            activations="int8",
        )
        assert made.after is not None
        assert made.after.relative_error is not None
        errors.append(made.after.relative_error)
    assert errors[1] < errors[0]
    assert weight_scales(tmp_path / "False.onnx") == [1, 1, 1]
    assert weight_scales(tmp_path / "True.onnx") == [16, 16, CLASSES]


def test_excluded_nodes_stay_float(net: Path, photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": photos, "preprocessing": PIXELS}
    whole = onnx_quantize.quantize(net, tmp_path / "whole.onnx", **options)
    part = onnx_quantize.quantize(net, tmp_path / "part.onnx", exclude=["fir*", "Gemm"], **options)
    assert part.quantized_nodes < whole.quantized_nodes
    assert weight_scales(tmp_path / "part.onnx") == [16]
    with pytest.raises(OptionError, match="no node or operator type fits 'third'"):
        onnx_quantize.quantize(net, tmp_path / "none.onnx", exclude=["third"], **options)
    assert not (tmp_path / "none.onnx").exists()


def test_an_older_opset_is_converted(photos: Path, tmp_path: Path) -> None:
    old = convolutional(tmp_path / "old.onnx", opset=11)
    made = onnx_quantize.quantize(
        old, tmp_path / "new.onnx", calibration=photos, preprocessing=PIXELS
    )
    assert made.after is not None
    assert made.after.agreement is not None
    assert made.after.agreement >= 0.9
    assert onnx.load(str(tmp_path / "new.onnx")).opset_import[0].version >= 13


def test_arrays_calibrate_and_bring_their_labels(net: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(2).random((40, 3, SIDE, SIDE), np.float32)
    data, out = tmp_path / "data.npz", tmp_path / "net8.onnx"
    np.savez(data, x=x, labels=run(net, x=x).argmax(1))
    made = onnx_quantize.quantize(net, out, calibration=data)
    assert made.before is not None
    assert made.before.accuracy == 1.0
    np.save(tmp_path / "data.npy", x)
    again = onnx_quantize.quantize(
        net, out, calibration=tmp_path / "data.npy", evaluation=data, force=True
    )
    assert again.after is not None
    assert made.after is not None
    assert again.after.max_error == made.after.max_error


def test_encoders_are_quantized_dynamically(tmp_path: Path) -> None:
    source, out, data = encoder(tmp_path / "e.onnx"), tmp_path / "e8.onnx", tmp_path / "tokens.npz"
    rng = np.random.default_rng(0)
    tokens = {"tokens": rng.integers(0, 50, (6, 9)), "mask": (rng.random((6, 9)) > 0.2) + 0}
    np.savez(data, **tokens)
    made = onnx_quantize.quantize(source, out, static=False, evaluation=data)
    assert made.after is not None
    assert made.after.relative_error is not None
    assert 0 < made.after.relative_error < 0.05
    assert made.after.accuracy is made.after.agreement is None
    assert kinds(out).count("MatMulInteger") == 6
    difference = np.abs(run(out, **tokens) - run(source, **tokens)).max()
    assert difference == pytest.approx(made.after.max_error, rel=0.2)
    # Without samples to measure with, the model is made all the same.
    assert onnx_quantize.quantize(source, tmp_path / "o.onnx", static=False).after is None


def test_the_command_prints_the_table(net: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "net8.onnx"
    arguments = ["--calibrate", str(photos), "--evaluate", str(photos), "--labels", "folders"]
    done = CliRunner().invoke(
        app, ["quantize-onnx", str(net), str(out), *arguments, "--scale", "1/255"]
    )
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    header = next(i for i, line in enumerate(lines) if "accuracy" in line)
    assert "same top-1" in lines[header]
    assert lines[header + 1].split()[0] == "float"
    assert lines[header + 2].split()[0] == "int8"
    assert "over 60 samples" in lines[header + 3]
    assert out.is_file()


def test_bad_models_end_in_one_line_and_leave_nothing(
    net: Path, photos: Path, tmp_path: Path
) -> None:
    out, content = tmp_path / "out.onnx", net.read_bytes()
    cut, noise, text = (tmp_path / f"{n}.onnx" for n in ("cut", "noise", "text"))
    cut.write_bytes(content[: len(content) // 2])
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    text.write_text("GGUF is no ONNX")
    nan = convolutional(tmp_path / "nan.onnx", broken=float("nan"))
    done = tmp_path / "done.onnx"
    onnx_quantize.quantize(net, done, calibration=photos, preprocessing=PIXELS)
    hybrid = onnx.load(str(net))
    hybrid.graph.initializer[1].CopyFrom(
        numpy_helper.from_array(np.ones((16, 16, 3, 3), np.int8), "stored")
    )
    cast = helper.make_node("Cast", ["stored"], ["w2"], to=TensorProto.FLOAT)
    hybrid.graph.node.insert(0, cast)
    onnx.save(hybrid, str(tmp_path / "hybrid.onnx"))
    before = sorted(tmp_path.iterdir())
    for path, kind, message in (
        (tmp_path / "hybrid.onnx", UnsupportedModelError, "--hybrid float first"),
        (cut, ModelFileError, "not a valid ONNX model"),
        (noise, ModelFileError, "not a valid ONNX model"),
        (text, ModelFileError, "not a valid ONNX model"),
        (nan, ModelFileError, "expected finite weights"),
        (done, UnsupportedModelError, "expected a float model, found .*: quantized already"),
        (tmp_path / "none.onnx", ModelFileError, "no such file"),
    ):
        with pytest.raises(kind, match=message) as caught:
            onnx_quantize.quantize(path, out, calibration=photos, preprocessing=PIXELS)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_bad_calibration_ends_in_one_line_and_leaves_nothing(
    net: Path, photos: Path, tmp_path: Path
) -> None:
    out, empty, mixed, torn = (tmp_path / n for n in ("out.onnx", "empty", "mixed", "torn"))
    for folder in (empty, mixed, torn):
        folder.mkdir()
    (mixed / "a.png").write_bytes(b"")
    np.save(mixed / "b.npy", np.zeros((3, SIDE, SIDE), np.float32))
    whole = next(photos.rglob("*.png")).read_bytes()
    (torn / "a.png").write_bytes(whole[:60])
    shape, nan, objects = (tmp_path / f"{n}.npy" for n in ("shape", "nan", "objects"))
    np.save(shape, np.zeros((4, 3, SIDE, SIDE + 1), np.float32))
    np.save(nan, np.full((4, 3, SIDE, SIDE), np.nan, np.float32))
    np.save(objects, np.array([{}]), allow_pickle=True)
    names, labels = tmp_path / "names.npz", tmp_path / "labels.csv"
    np.savez(names, x=np.zeros((2, 3, SIDE, SIDE), np.float32), y=np.zeros(2))
    labels.write_text("name,class\n000.png,1\n")
    before = sorted(tmp_path.iterdir())
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "needs --calibrate"),
        ({"calibration": tmp_path / "none"}, "expected a folder, or a .npy or .npz file"),
        ({"calibration": empty}, "expected images, .npy, .npz or .bin files, found none"),
        ({"calibration": mixed}, "found more than one kind"),
        ({"calibration": torn}, "cannot be read as an image"),
        ({"calibration": shape}, r"expected one sample of shape \[1, 3, 12, 12\]"),
        ({"calibration": nan}, "expected finite values"),
        ({"calibration": objects}, "cannot be read"),
        ({"calibration": names}, "expected the arrays x, found x, y"),
        ({"calibration": photos, "labels": labels}, "expected a row for each of 60, none for"),
        ({"calibration": photos, "labels": tmp_path / "none.csv"}, "cannot be read"),
        (
            {"calibration": photos, "method": "mean"},
            "expected one of minmax, percentile, found mean",
        ),
        ({"calibration": photos, "activations": "int4"}, "expected uint8 or int8"),
        ({"calibration": photos, "samples": 0}, "expected at least 1"),
    ]
    for options, message in cases:
        with pytest.raises(OptionError, match=message) as caught:
            onnx_quantize.quantize(net, out, **options)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(
    net: Path, photos: Path, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource", reason="limits of file sizes are of POSIX")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(DeviceError, match="no space left in") as caught:
            onnx_quantize.quantize(net, tmp_path / "out.onnx", calibration=photos)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_percentiles_leave_out_what_is_rare(net: Path, photos: Path, tmp_path: Path) -> None:
    """One huge sample widens the range that minmax takes."""
    x = np.random.default_rng(3).random((50, 3, SIDE, SIDE), np.float32)
    np.save(tmp_path / "usual.npy", x)
    x[7, 0, 0, 0] = 1000
    np.save(tmp_path / "data.npy", x)
    errors = {}
    for method in onnx_quantize.METHODS:
        made = onnx_quantize.quantize(
            net,
            tmp_path / f"{method}.onnx",
            calibration=tmp_path / "data.npy",
            evaluation=tmp_path / "usual.npy",
            method=method,
            activations="int8",
        )
        assert made.after is not None
        errors[method] = made.after.relative_error
    assert errors["percentile"] < errors["minmax"] / 2


def test_an_existing_output_is_kept(net: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    out.write_text("precious")
    with pytest.raises(OptionError, match="exists: choose another name"):
        onnx_quantize.quantize(net, out, calibration=photos)
    with pytest.raises(OptionError, match="expected another file than what it is made from"):
        onnx_quantize.quantize(net, net, calibration=photos, force=True)
    with pytest.raises(OptionError, match="no such directory"):
        onnx_quantize.quantize(net, tmp_path / "none" / "out.onnx", calibration=photos)
    assert out.read_text() == "precious"
    onnx_quantize.quantize(net, out, calibration=photos, preprocessing=PIXELS, force=True)
    onnx.checker.check_model(str(out))

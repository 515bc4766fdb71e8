"""tflite to ONNX: the interpreter's outputs, layouts, and files that contradict themselves."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tflite import (
    FLOAT,
    SAME,
    SAMPLES,
    TINY,
    VALID,
    TinyTflite,
    conv,
    model_samples,
    noise,
    reals,
)
from tiny_tflite_operators import CASES
from typer.testing import CliRunner

onnx = pytest.importorskip("onnx", reason="needs onnx (stoker[export])")
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime (stoker[export])")
pytest.importorskip("tflite", reason="needs tflite (stoker[export])")

from stoker.export import tflite  # noqa: E402
from stoker.runtime.base.errors import (  # noqa: E402
    DeviceError,
    ModelFileError,
    OptionError,
    UnsupportedModelError,
)
from stoker.runtime.cli.export.main import app  # noqa: E402

# ai-edge-litert's results, made by make_tflite_golden.py, which says how.
GOLDEN = Path(__file__).parents[1] / "data" / "tflite_golden.npz"
# Units of the 8-bit outputs. The default delegate rounds averages and sums of int8 as onnxruntime
# does, but for ResNet's additions; its own reference kernels are up to 36 units from it there.
UNITS = {"pretrainedResnet_quant": 16, "kws_ref_model_int8": 0, "vww_96_int8": 0, "ad01_int8": 1}
SCALES = {"quantized": (0.2, 0.1)}  # scales of the outputs of tiny int8 models


def run(model: Any, inputs: np.ndarray, *, fused: bool = True) -> list[np.ndarray]:
    """Runs the model; fused: int8 kernels in place of each QDQ group, else its float32 meaning."""
    content = model if isinstance(model, bytes) else model.SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [np.asarray(o) for o in session.run(None, {session.get_inputs()[0].name: inputs})]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[TinyTflite | bytes], Path]:
    def writer(model: TinyTflite | bytes) -> Path:
        path = tmp_path / "model.tflite"
        path.write_bytes(model if isinstance(model, bytes) else model.bytes())
        return path

    return writer


def shared_model(folder: Path, name: str) -> Path:
    path = folder / "tiny_models" / f"{name}.tflite"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


@pytest.mark.parametrize("activations", tflite.ACTIVATIONS)
@pytest.mark.parametrize("name", TINY)
def test_operators_compute_what_the_interpreter_computes(
    name: str, activations: str, write: Callable[[TinyTflite], Path]
) -> None:
    make, largest = TINY[name]
    model = make()
    made = tflite.to_onnx(write(model), activations=activations)
    shape = model.tensors[0]["shape"]
    with np.load(GOLDEN) as golden:
        expected = [golden[f"{name}/{i}"] for i in range(len(model.outputs))]
    # Without VNNI, x86 kernels of uint8 saturate: those values are checked unfused.
    fused = activations == "int8"
    rows = [run(made, reals(f"{name} {i}", shape, largest), fused=fused) for i in range(SAMPLES)]
    for i, want in enumerate(expected):
        found = np.concatenate([row[i] for row in rows])
        assert found.shape == want.shape
        assert np.ptp(want) > 0.1
        difference = np.abs(found - want)
        if name in SCALES:  # off by a unit where the last bit of a sum rounds the other way
            assert difference.max() <= SCALES[name][i] * 1.001
            assert (difference > 1e-6).mean() < 0.15
        else:
            assert difference.max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("name", FLOAT)
def test_float_models_equal_the_interpreter(name: str, shared_data: Path) -> None:
    made = tflite.to_onnx(shared_model(shared_data, name))
    with np.load(GOLDEN) as golden:
        expected = golden[f"{name}/0"]
    found = np.concatenate([run(made, s)[0] for s in model_samples(name)])
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    # The batch is free in these files: samples give the same together as alone.
    if name != "ad01_fp32":
        together = run(made, np.concatenate(model_samples(name)))[0]
        assert np.allclose(together, found, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("activations", tflite.ACTIVATIONS)
@pytest.mark.parametrize("name", UNITS)
def test_int8_models_equal_the_interpreter(name: str, activations: str, shared_data: Path) -> None:
    made = tflite.to_onnx(shared_model(shared_data, name), activations=activations)
    with np.load(GOLDEN) as golden:
        expected = golden[f"{name}/0"].astype(int)
    fused = activations == "int8"
    found = np.concatenate([run(made, s, fused=fused)[0] for s in model_samples(name)])
    assert found.dtype == np.int8
    difference = np.abs(found - expected)
    assert difference.max() <= UNITS[name]
    assert difference.mean() <= 1


def dense(weights: np.ndarray, *, samples: int = 2, **quantization: Any) -> TinyTflite:
    """Makes one FULLY_CONNECTED of float inputs."""
    m = TinyTflite()
    x = m.tensor((samples, weights.shape[1]))
    w = m.constant(weights, **quantization)
    options = {"FusedActivationFunction": 0, "WeightsFormat": 0, "KeepNumDims": False}
    y = m.tensor((samples, weights.shape[0]))
    m.inputs, m.outputs = [x], [m.add("FULLY_CONNECTED", [x, w], y, FullyConnectedOptions=options)]
    return m


def convolved() -> TinyTflite:
    """Makes one CONV_2D of one channel."""
    m = TinyTflite()
    m.inputs = [m.tensor((1, 4, 4, 1))]
    w = m.constant(reals("w", (2, 3, 3, 1)))
    m.outputs = [m.add("CONV_2D", [0, w], m.tensor((1, 4, 4, 2)), **conv(SAME))]
    return m


def test_hybrid_operators_round_their_inputs_or_not(write: Callable[[TinyTflite], Path]) -> None:
    stored, scale = noise("hybrid", (3, 64)), np.float32(0.02)
    path = write(dense(stored, scale=scale))
    x = reals("x", (2, 64), 3.0)
    x[1] = 0  # a sample without a scale
    exact = x.astype(float) @ (stored.astype(float) * scale).T
    found = run(tflite.to_onnx(path, hybrid="float"), x)[0]
    assert np.allclose(found, exact, rtol=1e-5, atol=1e-5)
    largest = np.abs(x).max(1, keepdims=True) + 1e-30
    rounded = np.rint(x * (127 / largest)) * (largest / 127)
    found = run(tflite.to_onnx(path, hybrid="dynamic"), x)[0]
    assert np.allclose(found, rounded.astype(float) @ (stored * scale).T, rtol=1e-5, atol=1e-5)
    assert not np.allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_halves_round_away_from_zero(write: Callable[[TinyTflite], Path]) -> None:
    """The largest value is 127: each input is its own integer, or one and a half of two."""
    below = np.nextafter(np.float32(0.5), np.float32(0))
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -2.5, below, -126.5]], np.float32)
    made = tflite.to_onnx(write(dense(np.eye(8, dtype=np.int8), samples=1, scale=1.0)))
    assert run(made, x)[0][0].tolist() == [127, 1, 2, 3, -1, -3, 0, -127]


def test_asymmetric_hybrid_operators_are_refused_unless_float(
    write: Callable[[TinyTflite], Path],
) -> None:
    path = write(dense(noise("h", (3, 8)), scale=0.02, zero=4))
    with pytest.raises(
        UnsupportedModelError, match=r"operator 0 \(FULLY_CONNECTED\).*hybrid=float"
    ):
        tflite.to_onnx(path)
    tflite.to_onnx(path, hybrid="float")


def test_layers_that_share_weights_share_them_in_the_file(
    write: Callable[[TinyTflite], Path],
) -> None:
    m = dense(reals("w", (64, 64)))
    kind, (_, w), (y,), options = m.operators[0]
    for _ in range(8):
        y = m.add(kind, [y, w], m.tensor((2, 64)), **options)
    m.outputs = [y]
    made = tflite.to_onnx(write(m))
    assert made.ByteSize() < 2 * 64 * 64 * 4
    assert run(made, reals("x", (2, 64)))[0].shape == (2, 64)


def test_a_command_writes_the_model(tmp_path: Path, write: Callable[[TinyTflite], Path]) -> None:
    path, out = write(convolved()), tmp_path / "net.onnx"
    done = CliRunner().invoke(app, ["tflite", str(path), str(out)])
    assert done.exit_code == 0, done.output
    assert "1 operators, float32" in done.output
    onnx.checker.check_model(str(out))
    before = out.read_bytes()
    with pytest.raises(OptionError, match="exists: choose another name"):
        tflite.convert(path, out)
    assert tflite.convert(path, out, force=True).nbytes == len(before)
    assert out.read_bytes() == before


@pytest.fixture
def interpreter() -> None:
    pytest.importorskip("ai_edge_litert", reason="needs tflite's interpreter (ai-edge-litert)")


@pytest.mark.usefixtures("interpreter")
def test_the_command_measures_against_the_interpreter(
    tmp_path: Path, write: Callable[[TinyTflite], Path]
) -> None:
    weights = reals("w", (5, 16))
    path, out, data = write(dense(weights, samples=1)), tmp_path / "net.onnx", tmp_path / "data"
    data.mkdir()
    rows = ["file,class"]
    for i in range(12):
        x = noise(f"x {i}", (16,))
        (data / f"{i}.bin").write_bytes(x.tobytes())
        rows.append(f"{i}.bin,{int((weights @ (x.astype(np.float32) - 3)).argmax())}")
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(rows))
    arguments = ["tflite", str(path), str(out), "--evaluate", str(data), "--labels", str(labels)]
    for kernels in ("--reference-kernels", "--default-kernels"):
        options = ["--mean", "3", "--scale", "1/64", kernels, "--force"]
        done = CliRunner().invoke(app, [*arguments, *options])
        assert done.exit_code == 0, done.output
        head, reference, made = (line.split() for line in done.stdout.splitlines()[:3])
        assert head[:2] == ["size", "accuracy"]
        assert reference[0] == "tflite"
        assert made[0] == "onnx"
        assert reference[3] == made[3] == "100.00%"
        assert 0 <= float(made[6]) <= 1e-5
    labels.write_text("0.bin,1\n")
    (data / "0.bin").write_bytes(b"short")
    before = out.read_bytes()
    for options, message in (
        ({"labels": labels}, "expected a row for each of 12"),
        ({}, r"0.bin: input t0: expected 16 bytes, int8 of shape \[16\], found 5"),
    ):
        with pytest.raises(OptionError, match=message):
            tflite.convert(path, out, evaluation=data, force=True, **options)
        with pytest.raises(OptionError, match=message):
            tflite.convert(path, tmp_path / "new.onnx", evaluation=data, **options)
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["data", "labels.csv", "model.tflite", "net.onnx"]
    )


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", FLOAT)
def test_the_interpreter_still_says_what_is_kept(name: str, shared_data: Path) -> None:
    from stoker.export.tflite_ops.interpreter import TfliteRunner

    path = shared_model(shared_data, name)
    runner = TfliteRunner(path, ["x"], reference_kernels=True)
    with np.load(GOLDEN) as golden:
        expected = golden[f"{name}/0"]
    found = runner.run({"x": np.concatenate(model_samples(name))})
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def hostile() -> dict[str, tuple[TinyTflite | bytes, type[Exception], str]]:
    """Files that cannot be converted, with the message for each."""
    plain = convolved().bytes()
    custom = convolved()
    custom.operators.append(("SQUARED_DIFFERENCE", [2, 2], [custom.tensor((1, 4, 4, 2))], {}))
    custom.operators.append(("CUMSUM", [2], [custom.tensor((1, 4, 4, 2))], {}))
    infinite = dense(np.full((2, 2), np.inf, np.float32))
    negative = dense(noise("n", (2, 2)), scale=-1.0)
    short = convolved()
    short.tensors[1]["shape"] = (2, 3, 3, 2)
    wrong = convolved()
    wrong.tensors[2]["shape"] = (1, 4, 5, 2)
    flat = convolved()
    flat.tensors[2]["shape"] = (1, 32)
    late = convolved()
    late.operators[0][1][0] = 2
    twice = convolved()
    twice.operators *= 2
    wide = convolved()
    wide.operators[0] = ("CONV_2D", [0, 1], [2], conv(VALID))
    wide.tensors[1] = {**wide.tensors[1], "shape": (2, 9, 1, 1)}
    passing = convolved()
    passing.outputs = [0]
    return {
        "missing operator": (
            custom,
            UnsupportedModelError,
            r"no conversion of operator 1 \(SQUARED_DIFFERENCE\), operator 2 \(CUMSUM\)",
        ),
        "empty": (b"", ModelFileError, "expected a tflite file"),
        "gguf": (b"GGUF" + bytes(64), ModelFileError, "expected a tflite file"),
        "cut": (plain[: len(plain) // 2], ModelFileError, "truncated or corrupt"),
        "nan": (infinite, ModelFileError, "tensor 1: expected finite weights"),
        "scale": (negative, ModelFileError, "expected positive finite scales, found -1"),
        "bytes": (short, ModelFileError, r"expected 144 bytes for \[2, 3, 3, 2\], found 72"),
        "shape": (wrong, ModelFileError, "operators contradict each other|as its operator makes"),
        "rank": (flat, ModelFileError, "expected four dimensions"),
        "order": (late, ModelFileError, r"operator 0 \(CONV_2D\) reads tensor 2 before"),
        "twice": (twice, ModelFileError, "makes tensor 2 again"),
        "window": (wide, ModelFileError, "expected a window within 4, found 9"),
        "no output": (passing, ModelFileError, "expected outputs that operators make"),
    }


@pytest.mark.parametrize("name", hostile())
def test_bad_files_end_in_one_line_and_leave_nothing(
    name: str, tmp_path: Path, write: Callable[[TinyTflite | bytes], Path]
) -> None:
    model, kind, message = hostile()[name]
    path = write(model)
    with pytest.raises(kind, match=message) as caught:
        tflite.convert(path, tmp_path / "out.onnx")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_bad_options_end_in_one_line_and_leave_nothing(
    tmp_path: Path, write: Callable[[TinyTflite], Path]
) -> None:
    path, out = write(convolved()), tmp_path / "out.onnx"
    with pytest.raises(OptionError, match="expected dynamic or float, found static"):
        tflite.convert(path, out, hybrid="static")
    with pytest.raises(OptionError, match="expected int8 or uint8, found int4"):
        tflite.convert(path, out, activations="int4")
    with pytest.raises(OptionError, match="no such directory"):
        tflite.convert(path, tmp_path / "none" / "out.onnx")
    with pytest.raises(OptionError, match="expected another file than what it is made from"):
        tflite.convert(path, path, force=True)
    with pytest.raises(ModelFileError, match="No such file"):
        tflite.convert(tmp_path / "none.tflite", out)
    with pytest.raises(ModelFileError, match="Is a directory"):
        tflite.convert(tmp_path, out)
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path, write: Callable[[TinyTflite], Path]
) -> None:
    resource = pytest.importorskip("resource", reason="limits of file sizes are of POSIX")
    path = write(dense(reals("w", (64, 64))))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(DeviceError, match=r"no space left|expected room"):
            tflite.convert(path, tmp_path / "out.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [path]


def overlapping(rows: int, **vectors: int) -> bytes:
    """A small file of `rows` tensors that all share one table, with vectors of so many numbers."""
    import flatbuffers
    import tflite as t

    b = flatbuffers.Builder(1024)
    name = b.CreateString("n" * vectors.get("name", 1))
    shape = b.CreateNumpyVector(np.ones(vectors.get("shape", 1), np.int32))
    scale = b.CreateNumpyVector(np.ones(vectors.get("scale", 1), np.float32))
    data = b.CreateNumpyVector(np.zeros(4 * vectors.get("shape", 1), np.uint8))
    buffers = []
    for constant in (False, True):
        t.BufferStart(b)
        if constant and vectors.get("data"):
            t.BufferAddData(b, data)
        buffers.append(t.BufferEnd(b))
    t.QuantizationParametersStart(b)
    t.QuantizationParametersAddScale(b, scale)
    quantization = t.QuantizationParametersEnd(b)
    t.TensorStart(b)
    t.TensorAddShape(b, shape)
    t.TensorAddBuffer(b, 1)
    t.TensorAddName(b, name)
    t.TensorAddQuantization(b, quantization)
    tensor = t.TensorEnd(b)
    t.SubGraphStartTensorsVector(b, rows)
    for _ in range(rows):
        b.PrependUOffsetTRelative(tensor)
    tensors = b.EndVector()
    ends = b.CreateNumpyVector(np.zeros(1, np.int32))
    t.SubGraphStart(b)
    t.SubGraphAddTensors(b, tensors)
    t.SubGraphAddInputs(b, ends)
    t.SubGraphAddOutputs(b, ends)
    graph = t.SubGraphEnd(b)
    t.ModelStartSubgraphsVector(b, 1)
    b.PrependUOffsetTRelative(graph)
    graphs = b.EndVector()
    t.ModelStartBuffersVector(b, 2)
    for buffer in reversed(buffers):
        b.PrependUOffsetTRelative(buffer)
    rows_of_buffers = b.EndVector()
    t.ModelStart(b)
    t.ModelAddVersion(b, 3)
    t.ModelAddSubgraphs(b, graphs)
    t.ModelAddBuffers(b, rows_of_buffers)
    b.Finish(t.ModelEnd(b), file_identifier=b"TFL3")
    return bytes(b.Output())


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: overlapping(5000, name=100000), id="names"),
        pytest.param(lambda: overlapping(5000, shape=8), id="shapes"),
        pytest.param(lambda: overlapping(5000, scale=20000), id="scales"),
        pytest.param(lambda: overlapping(5000, shape=20000, data=1), id="constants"),
        pytest.param(lambda: overlapping(70000), id="rows"),
    ],
)
def test_a_small_file_costs_little_time_and_memory(
    content: Callable[[], bytes], write: Callable[[bytes], Path]
) -> None:
    path = write(content())
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises((ModelFileError, UnsupportedModelError)):
            tflite.to_onnx(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6
    assert time.process_time() - start < 20  # quadratic work takes minutes


# These operators read the most of a file, beside the models of many operators.
MUTATED = (
    "strided slice ellipsis and axes",
    "split v (3, -1)",
    "gather table",
    "transpose conv bias 2 by 2",
    "mirror pad 0",
    "sparse of blocks half",
)
BASES = [make().bytes() for make, _ in TINY.values()]
BASES += [CASES[name]().bytes() for name in MUTATED]
EXTREMES = (0, 1, 4, 127, 255, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFF)


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A small model with some bytes or words changed, moved or cut off."""
    content = bytearray(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content) - 4))
        kind = draw(st.sampled_from(("byte", "word", "step", "copy", "cut")))
        word = slice(at & ~3, (at & ~3) + 4)
        if kind == "byte":
            content[at] = draw(st.integers(0, 255))
        elif kind == "word":
            content[word] = draw(st.sampled_from(EXTREMES)).to_bytes(4, "little")
        elif kind == "step":
            old = int.from_bytes(content[word], "little")
            content[word] = ((old + draw(st.integers(-64, 64))) % 2**32).to_bytes(4, "little")
        elif kind == "copy":
            source = draw(st.integers(0, len(content) - 4))
            count = min(draw(st.integers(1, 64)), len(content) - max(at, source))
            content[at : at + count] = content[source : source + count]
        elif len(content) > 64:
            del content[max(at, 64) :]
    return bytes(content)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=mutations(), options=st.sampled_from([("int8", "dynamic"), ("uint8", "float")]))
def test_any_mutation_is_an_error_or_a_model(
    content: bytes, options: tuple[str, str], write: Callable[[bytes], Path]
) -> None:
    path = write(content)
    try:
        made = tflite.to_onnx(path, activations=options[0], hybrid=options[1])
    except (ModelFileError, UnsupportedModelError) as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        assert len(str(error)) < len(str(path)) + 700
    else:
        onnx.checker.check_model(made, full_check=True)

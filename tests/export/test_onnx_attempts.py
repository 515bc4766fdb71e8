"""int8 ONNX models of every kind of float model run, and some nodes stay float."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

onnx = pytest.importorskip("onnx", reason="needs onnx (stoker[export])")
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime (stoker[export])")
pytest.importorskip("onnxruntime.quantization", reason="needs onnxruntime (stoker[export])")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from stoker.export import onnx_quantize  # noqa: E402
from stoker.export.onnx import trial as onnx_trial  # noqa: E402
from stoker.runtime.base.errors import OptionError, UnsupportedModelError  # noqa: E402
from stoker.runtime.cli.export.main import app  # noqa: E402

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
Ends = Sequence[tuple[Any, ...]]


def weight(name: str, *shape: int, dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(len(name) + sum(shape))
    return numpy_helper.from_array((rng.standard_normal(shape) * 0.3).astype(dtype), name)


def node(kind: str, inputs: str, output: str, **options: Any) -> Any:
    return helper.make_node(kind, inputs.split(), output.split(), **options)


def model(nodes: Any, inputs: Ends, outputs: Ends, constants: Any, **options: Any) -> Any:
    """inputs, outputs: (name, shape) or (name, shape, type); options: opset, ir, functions, ..."""
    kind = options.get("type", FLOAT)
    ends = [
        [helper.make_tensor_value_info(e[0], e[2] if len(e) > 2 else kind, e[1]) for e in side]
        for side in (inputs, outputs)
    ]
    domains = [helper.make_opsetid("", options.get("opset", 17))]
    domains += [helper.make_opsetid(d, 1) for d in options.get("domains", ())]
    return helper.make_model(
        helper.make_graph(nodes, "net", *ends, constants),
        opset_imports=domains,
        ir_version=options.get("ir", 8),
        functions=options.get("functions", []),
    )


def doubled() -> Any:
    """Makes a model with a function of its own, called twice."""
    body = [node("MatMul", "a b", "t"), node("Relu", "t", "c")]
    opset = [helper.make_opsetid("", 17)]
    layer = helper.make_function("own", "Layer", ["a", "b"], ["c"], body, opset)
    nodes = [
        node("Layer", "x w", "h", domain="own", name="one"),
        node("Layer", "h v", "y", domain="own", name="two"),
    ]
    return model(
        nodes,
        [("x", ["n", 8])],
        [("y", ["n", 5])],
        [weight("w", 8, 8), weight("v", 8, 5)],
        functions=[layer],
        domains=["own"],
    )


def looped() -> Any:
    """Makes a product within a Loop, and one before it, with the same weights."""
    ends = ("it", [], TensorProto.INT64), ("go", [], TensorProto.BOOL), ("h", ["n", 8], FLOAT)
    body = helper.make_graph(
        [node("MatMul", "h w", "h2"), node("Identity", "go", "more")],
        "body",
        [helper.make_tensor_value_info(n, t, s) for n, s, t in ends],
        [
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h2", FLOAT, ["n", 8]),
        ],
    )
    times = numpy_helper.from_array(np.int64(2), "times")
    true = numpy_helper.from_array(np.array(True), "true")
    nodes = [node("MatMul", "x w", "a"), node("Loop", "times true a", "y", body=body)]
    return model(nodes, [("x", ["n", 8])], [("y", ["n", 8])], [weight("w", 8, 8), times, true])


def product(*shape: int, rank: int = 3, **options: Any) -> Any:
    """x @ w for weights of any shape."""
    leading = list(shape[:-2]) if rank == 3 and shape[0] != 1 else ["n"] * (rank > 2)
    wide = [*leading, 6, shape[-1]] if len(shape) > 1 else [*leading, 6]
    if len(shape) > rank:
        wide = [1, *wide]
    deep = shape[-2] if len(shape) > 1 else shape[-1]
    ends = [("x", [*leading, 6, deep])], [("y", wide)]
    return model([node("MatMul", "x w", "y")], *ends, [weight("w", *shape)], **options)


def half() -> Any:
    """Makes an embedding, a layer and a head in half precision; ids in, logits out."""
    constants = [
        weight("table", 20, 8, dtype=np.float16),
        weight("w", 8, 8, dtype=np.float16),
        weight("bias", 20, dtype=np.float16),
    ]
    nodes = [
        node("Gather", "table ids", "x"),
        node("MatMul", "x w", "h"),
        node("Mul", "h gain", "g"),
        node("Gemm", "g table bias", "y", transB=1),
    ]
    ends = [("ids", ["n"], TensorProto.INT64), ("gain", ["n", 8], HALF)]
    return model(nodes, ends, [("y", ["n", 20]), ("g", ["n", 8])], constants, type=HALF)


def branched() -> Any:
    """Makes half precision within the branches of an If, with outer weights and their own."""

    def branch(name: str, own: list[Any]) -> Any:
        product = node("MatMul", "h v" if own else "h w", name)
        end = helper.make_tensor_value_info(name, HALF, ["n", 8])
        return helper.make_graph([product], name, [], [end], own)

    then = branch("yes", [])
    other = branch("no", [weight("v", 8, 8, dtype=np.float16)])
    zero = numpy_helper.from_array(np.float16(0), "zero")
    nodes = [
        node("MatMul", "x w", "h"),
        node("ReduceSum", "h", "sum", keepdims=0),
        node("Greater", "sum zero", "positive"),
        node("If", "positive", "y", then_branch=then, else_branch=other),
    ]
    ends = [("x", ["n", 8])], [("y", ["n", 8])]
    return model(nodes, *ends, [weight("w", 8, 8, dtype=np.float16), zero], type=HALF)


def constant(name: str, *shape: int) -> Any:
    return helper.make_node("Constant", [], [name], value=weight(name, *shape))


LINE = [("x", ["n", 8])], [("y", ["n", 5])]
IMAGE = [("x", ["n", 3, 8, 8])], [("y", ["n", 4, 6, 6])]
KINDS: dict[str, Any] = {
    "matmul 3-D": product(1, 8, 5),
    "matmul 3-D, many": product(4, 8, 5),
    "matmul 3-D, flat input": product(1, 8, 5, rank=2),
    "matmul 1-D": product(8),
    "matmul, named as its output": model(
        [node("MatMul", "x w", "w_quantized"), node("MatMul", "w_quantized v", "y")],
        *LINE,
        [weight("w", 8, 8), weight("v", 8, 5)],
    ),
    "gemm alpha and beta": model(
        [node("Gemm", "x w b", "y", alpha=0.5, beta=-2.0)],
        *LINE,
        [weight("w", 8, 5), weight("b", 5)],
    ),
    "gemm transA": model(
        [node("Gemm", "x w", "y", transA=1, transB=1)],
        [("x", [8, 4])],
        [("y", [4, 5])],
        [weight("w", 5, 8)],
    ),
    "gemm alpha beside another": model(
        [node("Gemm", "x w", "h", alpha=0.5), node("Gemm", "h v b", "y")],
        *LINE,
        [weight("w", 8, 8), weight("v", 8, 5), weight("b", 5)],
    ),
    "gemm transA beside another": model(
        [node("Gemm", "x w", "h", transA=1), node("Gemm", "h v", "y", transB=1)],
        [("x", [8, 8])],
        [("y", [8, 5])],
        [weight("w", 8, 8), weight("v", 5, 8)],
    ),
    "conv 1-D": model(
        [node("Conv", "x w b", "y")],
        [("x", ["n", 3, 16])],
        [("y", ["n", 4, 14])],
        [weight("w", 4, 3, 3), weight("b", 4)],
    ),
    "conv 3-D": model(
        [node("Conv", "x w b", "y")],
        [("x", ["n", 3, 6, 6, 6])],
        [("y", ["n", 4, 4, 4, 4])],
        [weight("w", 4, 3, 3, 3, 3), weight("b", 4)],
    ),
    "shared by two products": model(
        [node("MatMul", "x w", "h"), node("MatMul", "h w", "y")],
        [("x", ["n", 8])],
        [("y", ["n", 8])],
        [weight("w", 8, 8)],
    ),
    "shared by a table and a head": model(
        [node("Gather", "e ids", "x"), node("Gemm", "x e", "y", transB=1)],
        [("ids", ["n"], TensorProto.INT64)],
        [("y", ["n", 20])],
        [weight("e", 20, 8)],
    ),
    "constant nodes": model([constant("w", 8, 5), node("MatMul", "x w", "y")], *LINE, []),
    "weights that are an output": model(
        [node("MatMul", "x w", "y")], LINE[0], [*LINE[1], ("w", [8, 5])], [weight("w", 8, 5)]
    ),
    "weights that are an input": model(
        [node("MatMul", "x w", "y")],
        [*LINE[0], ("w", [8, 5])],
        LINE[1],
        [weight("w", 8, 5)],
        opset=8,
        ir=3,
    ),
    "opset 7": product(8, 5, rank=2, opset=7),
    "opset 11 of another domain": model(
        [node("MatMul", "x w", "h"), node("Gelu", "h", "y", domain="com.microsoft")],
        *LINE,
        [weight("w", 8, 5)],
        opset=11,
        domains=["com.microsoft"],
    ),
    "opset 21": product(8, 5, rank=2, opset=21, ir=10),
    "operators that the checker does not know": model(
        [node("SimplifiedLayerNormalization", "x g", "h", axis=-1), node("MatMul", "h w", "y")],
        *LINE,
        [weight("g", 8), weight("w", 8, 5)],
    ),
    "functions": doubled(),
    "loop": looped(),
    "half": half(),
    "half in branches": branched(),
    "half conv": model(
        [node("Conv", "x w b", "y")],
        *IMAGE,
        [weight("w", 4, 3, 3, 3, dtype=np.float16), weight("b", 4, dtype=np.float16)],
        type=HALF,
    ),
    "half within": model(
        [
            node("Cast", "x", "h", to=HALF),
            node("MatMul", "h w", "p"),
            node("Cast", "p", "y", to=FLOAT),
        ],
        *LINE,
        [weight("w", 8, 5, dtype=np.float16)],
    ),
}  # fmt: skip


def samples(net: Any, count: int, seed: int) -> dict[str, np.ndarray]:
    """Makes inputs by name; `count` is used for free dimensions."""
    rng = np.random.default_rng(seed)
    constants = {w.name for w in net.graph.initializer}
    found = {}
    for value in net.graph.input:
        if value.name not in constants:
            kind = value.type.tensor_type
            shape = [d.dim_value or count for d in kind.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            ints = dtype.kind == "i"
            values = rng.integers(0, 8, shape) if ints else rng.standard_normal(shape)
            found[value.name] = values.astype(dtype)
    return found


def run(path: Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [np.asarray(o) for o in session.run(None, feed)]


def kinds(path: Path) -> list[str]:
    return [n.op_type for n in onnx.load(str(path)).graph.node]


def save(net: Any, path: Path) -> Path:
    onnx.save(net, str(path))
    return path


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_made_runs_and_is_near(name: str, static: bool, tmp_path: Path) -> None:
    """Types, shapes and names of the inputs and outputs are those of the float model."""
    net = KINDS[name]
    source, out = save(net, tmp_path / "net.onnx"), tmp_path / "net8.onnx"
    options: dict[str, Any] = {"static": False}
    if static:
        first = next(iter(samples(net, 1, 0).values()))
        if first.shape[0] != 1:
            pytest.skip("calibration takes models of a free batch")
        np.savez(tmp_path / "rows.npz", **samples(net, 9, 5))
        options = {"calibration": tmp_path / "rows.npz"}
    made = onnx_quantize.quantize(source, out, **options)
    assert made.quantized_nodes > 0
    feed = samples(net, 9 if static else 3, 5)
    for found, wanted in zip(run(out, feed), run(source, feed), strict=True):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        wide = wanted.astype(float)
        assert np.abs(found - wide).max() <= 0.03 * np.abs(wide).max()  # rounding to 8 bits
    constants = {w.name for w in net.graph.initializer}
    names = [v.name for v in net.graph.input if v.name not in constants]
    assert [v.name for v in onnx.load(str(out)).graph.input] == names


def test_products_with_leading_ones_have_a_scale_for_each_channel(tmp_path: Path) -> None:
    """onnxruntime's own quantizer makes a file of such weights that does not run (25489)."""
    source, out = save(product(1, 8, 5), tmp_path / "net.onnx"), tmp_path / "net8.onnx"
    assert not onnx_quantize.quantize(source, out, static=False).notes
    scales = [w for w in onnx.load(str(out)).graph.initializer if w.name.endswith("_scale")]
    assert [list(s.dims) for s in scales] == [[5]]
    many = save(product(4, 8, 5), tmp_path / "many.onnx")
    made = onnx_quantize.quantize(many, out, static=False, force=True)
    assert "one scale for each weight" in made.notes[0]


def test_a_node_that_does_not_go_stays_float_and_is_named(tmp_path: Path) -> None:
    nodes = [
        node("Gather", "e ids", "x", name="/rows"),
        node("Gemm", "x e", "y", name="/head", transB=1),
    ]
    ends = [("ids", ["n"], TensorProto.INT64)], [("y", ["n", 20])]
    source = save(model(nodes, *ends, [weight("e", 20, 8)]), tmp_path / "net.onnx")
    np.save(tmp_path / "ids.npy", np.arange(20))
    out = tmp_path / "net8.onnx"
    arguments = ["quantize-onnx", str(source), str(out), "--calibrate", str(tmp_path / "ids.npy")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "note: float, since onnxruntime does not run them quantized: /head (Gemm)" in done.output
    assert run(out, {"ids": np.arange(4)})[0].shape == (4, 20)


def test_external_data_of_the_source_is_taken_in(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    net, source, out = product(64, 32, rank=2), folder / "net.onnx", tmp_path / "net8.onnx"
    onnx.save(net, str(source), save_as_external_data=True, location="net.bin", size_threshold=0)
    onnx_quantize.quantize(source, out, static=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net8.onnx", "source"]
    feed = samples(product(64, 32, rank=2), 3, 1)
    assert np.allclose(run(out, feed)[0], run(source, feed)[0], atol=0.1)
    (folder / "net.bin").unlink()
    with pytest.raises(Exception, match=r"net\.onnx: not a valid ONNX model"):
        onnx_quantize.quantize(source, out, static=False, force=True)


def test_a_file_that_does_not_run_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quantizer makes what onnxruntime refuses, whichever nodes are left out."""
    from onnxruntime import quantization

    def broken(source: Path, out: Path, **_: Any) -> None:
        net = onnx.load(str(source))
        net.graph.node[0].op_type = "MatMulInteger"
        onnx.save(net, str(out))

    monkeypatch.setattr(quantization, "quantize_dynamic", broken)
    source, out = save(product(8, 5, rank=2), tmp_path / "net.onnx"), tmp_path / "net8.onnx"
    with pytest.raises(UnsupportedModelError) as caught:
        onnx_quantize.quantize(source, out, static=False)
    assert "net8.onnx: onnxruntime does not run the model that was made" in str(caught.value)
    assert str(caught.value).endswith("keep what fails float (--exclude)")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_other_shapes_or_infinite_outputs_are_no_success(tmp_path: Path) -> None:
    net = product(8, 5, rank=2)
    feed = samples(net, 3, 1)
    content, path = net.SerializeToString(), tmp_path / "net.onnx"
    right = feed["x"] @ numpy_helper.to_array(net.graph.initializer[0])
    onnx_trial.run_once(path, content, advice="-", feed=feed, expected=[right])
    onnx_trial.run_once(path, content, advice="-")
    with pytest.raises(UnsupportedModelError, match=r"output y: expected float32 \[2, 5\], found"):
        onnx_trial.run_once(path, content, advice="-", feed=feed, expected=[right[:2]])
    with pytest.raises(UnsupportedModelError, match="output y: expected finite values"):
        wide = {"x": feed["x"] * np.float32(np.inf)}
        onnx_trial.run_once(path, content, advice="-", feed=wide, expected=[right])
    huge = model([node("Identity", "x", "y")], [("x", [1 << 40])], [("y", [1 << 40])], [])
    with pytest.raises(UnsupportedModelError, match="expected one that fits the memory"):
        onnx_trial.run_once(path, huge.SerializeToString(), advice="-")


def test_inputs_of_our_own_fit_windows_and_lengths(tmp_path: Path) -> None:
    """A free dimension of one is too small for a convolution without padding."""
    nodes = [node("Conv", "x w", "c"), node("Gather", "table ids", "g"), node("Add", "c g", "y")]
    net = model(
        nodes,
        [("x", ["n", 3, "h", "w"]), ("ids", [1], TensorProto.INT64)],
        [("y", ["n", 4, "a", "b"])],
        [weight("w", 4, 3, 7, 7), weight("table", 1)],  # the weights do not hold id 1
    )
    onnx_trial.run_once(tmp_path / "net.onnx", net.SerializeToString(), advice="-")


def test_a_model_that_takes_no_invented_inputs_needs_some(tmp_path: Path) -> None:
    nodes = [
        node("Sub", "ids base", "at"),
        node("Gather", "table at", "h"),
        node("MatMul", "h w", "y"),
    ]
    ends = [("ids", ["n"], TensorProto.INT64)], [("y", ["n", 5])]
    base = numpy_helper.from_array(np.int64(100), "base")
    net = model(nodes, *ends, [weight("table", 4, 8), weight("w", 8, 5), base])
    source, out = save(net, tmp_path / "net.onnx"), tmp_path / "net8.onnx"
    with pytest.raises(OptionError, match=r"does not run on inputs of stoker's own.*--evaluate"):
        onnx_quantize.quantize(source, out, static=False)
    np.save(tmp_path / "ids.npy", np.arange(100, 104))
    assert onnx_quantize.quantize(
        source, out, static=False, evaluation=tmp_path / "ids.npy"
    ).quantized_nodes


# Nodes that stay float.


def two_layers(*, named: bool) -> Any:
    names = ("/fc1/Gemm", "/fc[0]/Relu", "/fc2/Gemm", "/out/MatMul") if named else ("",) * 4
    nodes = [
        node("Gemm", "x w1", "a", name=names[0], transB=1),
        node("Relu", "a", "r", name=names[1]),
        node("Gemm", "r w2 b2", "g", name=names[2]),
        node("MatMul", "g w3", "y", name=names[3]),
    ]
    constants = [weight("w1", 32, 8), weight("w2", 32, 6), weight("b2", 6), weight("w3", 6, 5)]
    return model(nodes, *LINE, constants)


def float_layers(net: Any, out: Path) -> list[bool]:
    """Whether each layer's weights are unchanged, told by size: 256, 192, 30 values."""
    kept = {
        int(np.prod(w.dims))
        for w in onnx.load(str(out)).graph.initializer
        if w.data_type == FLOAT and len(w.dims) == 2
    }
    return [n in kept for n in (256, 192, 30)]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("named", "exclude", "wanted"),
    [
        (True, [], [False, False, False]),
        (True, ["/fc2/Gemm"], [False, True, False]),
        (True, ["Gemm"], [True, True, False]),
        (True, ["*fc1*"], [True, False, False]),
        (True, ["Mat*"], [False, False, True]),
        (True, ["/fc[0]/Relu"], [False, False, False]),  # a name with brackets, not a pattern
        (True, ["/fc?/Gemm", "/out/MatMul"], [True, True, True]),
        (False, ["MatMul"], [False, False, True]),
        (False, ["Gemm"], [True, True, False]),
        (False, ["G*", "MatMul"], [True, True, True]),
    ],
)
def test_excluded_nodes_stay_float(
    static: bool, named: bool, exclude: list[str], wanted: list[bool], tmp_path: Path
) -> None:
    net = two_layers(named=named)
    source, out = save(net, tmp_path / "net.onnx"), tmp_path / "net8.onnx"
    feed = samples(net, 9, 5)
    np.save(tmp_path / "x.npy", feed["x"])
    options: dict[str, Any] = {"calibration": tmp_path / "x.npy"} if static else {"static": False}
    made = onnx_quantize.quantize(source, out, exclude=exclude, **options)
    assert float_layers(net, out) == wanted
    assert ("nothing is quantized" in "".join(made.notes)) == all(wanted)
    assert np.allclose(run(out, feed)[0], run(source, feed)[0], atol=0.1)


def test_exclusion_follows_nodes_that_are_fused_or_inlined(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "c", name="conv"),
        node("BatchNormalization", "c s o m v", "d", name="norm"),
        node("Conv", "d w2", "y", name="second"),
    ]
    constants = [weight("w", 4, 3, 1, 1), *(weight(n, 4) for n in "som")]
    constants += [numpy_helper.from_array(np.ones(4, np.float32), "v"), weight("w2", 4, 4, 3, 3)]
    source, out = save(model(nodes, *IMAGE, constants), tmp_path / "net.onnx"), tmp_path / "8.onnx"
    for pattern in ("norm", "conv", "BatchNormalization"):
        onnx_quantize.quantize(source, out, static=False, exclude=[pattern], force=True)
        assert kinds(out).count("ConvInteger") == 1
        assert kinds(out).count("Conv") == 1
    source = save(doubled(), tmp_path / "calls.onnx")
    for pattern, integers in (("two", 1), ("Layer", 0), ("Relu", 2), ("MatMul", 0)):
        onnx_quantize.quantize(source, out, static=False, exclude=[pattern], force=True)
        assert kinds(out).count("MatMulInteger") == integers, pattern


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("named", [False, True])
def test_a_pattern_that_fits_nothing_is_an_error_with_near_names(
    static: bool, named: bool, tmp_path: Path
) -> None:
    net = two_layers(named=named)
    source, out = save(net, tmp_path / "net.onnx"), tmp_path / "net8.onnx"
    np.save(tmp_path / "x.npy", samples(net, 9, 1)["x"])
    options: dict[str, Any] = {"calibration": tmp_path / "x.npy"} if static else {"static": False}
    for pattern, near in (("Gem", "Gemm"), ("matmul", "MatMul"), ("Conv", "Gemm"), ("", "Gemm")):
        with pytest.raises(OptionError) as caught:
            onnx_quantize.quantize(source, out, exclude=[pattern], **options)
        assert f"no node or operator type fits {pattern!r}" in str(caught.value)
        assert near in str(caught.value)
    assert not out.exists()

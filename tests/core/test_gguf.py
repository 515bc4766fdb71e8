"""The GGUF reader: what the gguf package writes is read back; anything broken is a clear error."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stoker.runtime._core import GgufFile
from stoker.runtime.base.errors import ModelFileError, UnsupportedModelError

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALARS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?"}
SCALARS |= {U64: "Q", I64: "q", F64: "d"}
F32_TENSOR, Q4_0, Q4_K, IQ1_S = 0, 2, 12, 19


# ------------------------------------------------------------------ files byte by byte


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: Any) -> bytes:
    """A metadata value: `content` is (element kind, list) where `kind` is ARRAY."""
    if kind == STRING:
        return text(content)
    if kind == ARRAY:
        element, items = content
        head = struct.pack("<IQ", element, len(items))
        return head + b"".join(value(element, item) for item in items)
    return struct.pack("<" + SCALARS[kind], content)


def pair(key: str | bytes, kind: int, content: Any) -> bytes:
    return text(key) + struct.pack("<I", kind) + value(kind, content)


def entry(name: str, shape: tuple[int, ...], kind: int = F32_TENSOR, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def file_bytes(
    pairs: list[bytes] = [],  # noqa: B006 - never changed
    entries: list[bytes] = [],  # noqa: B006
    *,
    data: int = 0,
    version: int = 3,
    n_tensors: int | None = None,
    n_pairs: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file with `data` zero bytes of tensor data."""
    out = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(entries) if n_tensors is None else n_tensors,
        len(pairs) if n_pairs is None else n_pairs,
    )
    out += b"".join(pairs) + b"".join(entries)
    return out + bytes(-len(out) % alignment) + bytes(data) if data else out


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def save(content: bytes, name: str = "model.gguf") -> str:
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)

    return save


def refused(path: str, *words: str, kind: type[Exception] = ModelFileError) -> str:
    """Opening must raise `kind` with one line that begins with the path and has all `words`."""
    with pytest.raises(kind) as caught:
        GgufFile(path)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# ------------------------------------------------------------------ what is read


def small_model(path: Path, alignment: int = 32) -> dict[str, np.ndarray[Any, Any]]:
    """A small file by the gguf package; returns its tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("k.u8", 255)
    writer.add_int8("k.i8", -128)
    writer.add_uint16("k.u16", 65535)
    writer.add_int16("k.i16", -32768)
    writer.add_uint32("k.u32", 2**32 - 1)
    writer.add_int32("k.i32", -(2**31))
    writer.add_uint64("k.u64", 2**64 - 1)
    writer.add_int64("k.i64", -(2**63))
    writer.add_float32("k.f32", 0.1)
    writer.add_float64("k.f64", 0.1)
    writer.add_bool("k.true", True)
    writer.add_bool("k.false", False)
    writer.add_string("k.string", "naïve ☃")
    writer.add_array("k.strings", ["", "a", "日本"])
    writer.add_array("k.ints", [-1, 2, 3])
    writer.add_array("k.floats", [0.5, -1.25])
    writer.add_array("k.bools", [True, False])
    writer.add_array("k.nested", [[1, 2], [3]])
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "token_embd.weight": rng.normal(size=(3, 32)).astype(np.float32),
        "half": rng.normal(size=(5,)).astype(np.float16),
        "experts": rng.normal(size=(2, 2, 4)).astype(np.float32),
    }
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    quantized = gguf.quants.quantize(rng.normal(size=(2, 64)), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("quantized", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    tensors["quantized"] = quantized
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_every_metadata_type(tmp_path: Path) -> None:
    small_model(tmp_path / "m.gguf")
    file = GgufFile(str(tmp_path / "m.gguf"))
    assert file.metadata == {
        "general.architecture": "llama",
        "k.u8": 255,
        "k.i8": -128,
        "k.u16": 65535,
        "k.i16": -32768,
        "k.u32": 2**32 - 1,
        "k.i32": -(2**31),
        "k.u64": 2**64 - 1,
        "k.i64": -(2**63),
        "k.f32": float(np.float32(0.1)),
        "k.f64": 0.1,
        "k.true": True,
        "k.false": False,
        "k.string": "naïve ☃",
        "k.strings": ["", "a", "日本"],
        "k.ints": [-1, 2, 3],
        "k.floats": [0.5, -1.25],
        "k.bools": [True, False],
        "k.nested": [[1, 2], [3]],
    }
    assert file.get("k.true") is True
    assert file.get("k.nested") == [[1, 2], [3]]
    assert file.get("absent") is None
    assert file.version == 3
    assert file.shards == [file.path] == [str(tmp_path / "m.gguf")]
    assert file.nbytes == (tmp_path / "m.gguf").stat().st_size


@pytest.mark.parametrize("alignment", [32, 8, 4096])
def test_tensors_are_where_the_directory_says(tmp_path: Path, alignment: int) -> None:
    tensors = small_model(tmp_path / "m.gguf", alignment)
    content = (tmp_path / "m.gguf").read_bytes()
    found = {t.name: t for t in GgufFile(str(tmp_path / "m.gguf")).tensors}
    assert list(found) == list(tensors)
    for name, array in tensors.items():
        t = found[name]
        assert t.shard == 0
        assert t.nbytes == array.nbytes
        assert content[t.offset : t.offset + t.nbytes] == array.tobytes()
    assert found["experts"].shape == (4, 2, 2)
    assert found["quantized"].shape == (64, 2)
    types = ["F32", "F16", "F32", "Q8_0"]
    assert [t.type for t in found.values()] == types


def test_types_that_only_inspect_knows(write: Callable[..., str]) -> None:
    """A type without kernels is listed with its size, a type from the future without one."""
    entries = [entry("a", (256, 2), IQ1_S), entry("b", (7,), 1234, 128)]
    path = write(file_bytes([], entries, data=160))
    a, b = GgufFile(path).tensors
    assert (a.type, a.nbytes) == ("IQ1_S", 100)
    assert (b.type, b.nbytes, b.shape) == ("type 1234", 0, (7,))


def test_sizes_equal_the_gguf_package(write: Callable[..., str]) -> None:
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        if kind is gguf.GGMLQuantizationType.Q8_1:
            continue  # the package says 40 bytes, ggml's struct has 36; no file holds it
        file = GgufFile(write(file_bytes([], [entry("t", (block * 2, 3), kind)], data=size * 6)))
        assert (file.tensors[0].type, file.tensors[0].nbytes) == (kind.name, size * 6)


def test_version_2_and_no_tensors(write: Callable[..., str]) -> None:
    file = GgufFile(write(file_bytes([pair("a", U32, 1)], version=2)))
    assert file.version == 2
    assert file.metadata == {"a": 1}
    assert file.tensors == []


def test_bytes_that_are_no_utf8(write: Callable[..., str]) -> None:
    file = GgufFile(write(file_bytes([pair("k", ARRAY, (STRING, [b"\xff\x00", b"ok"]))])))
    first, second = file.get("k")
    assert first.encode(errors="surrogateescape") == b"\xff\x00"
    assert second == "ok"


def test_empty_arrays_and_arrays_of_every_type(write: Callable[..., str]) -> None:
    contents = {kind: [1, 0] for kind in (U8, U16, U32, U64)}
    contents |= {kind: [-1, 2] for kind in (I8, I16, I32, I64)}
    contents |= {F32: [0.5], F64: [0.1], BOOL: [True, False], STRING: ["x"], ARRAY: [(U8, [])]}
    pairs = [pair(f"full.{kind}", ARRAY, (kind, items)) for kind, items in contents.items()]
    pairs += [pair(f"empty.{kind}", ARRAY, (kind, [])) for kind in contents]
    file = GgufFile(write(file_bytes(pairs)))
    for kind, items in contents.items():
        assert file.get(f"full.{kind}") == ([[]] if kind == ARRAY else items)
        assert file.get(f"empty.{kind}") == []
    assert file.get(f"full.{BOOL}")[0] is True


def test_arrays_nested_as_deep_as_allowed(write: Callable[..., str]) -> None:
    deep = pair("k", ARRAY, (ARRAY, [(ARRAY, [(ARRAY, [(U8, [1])])]), (ARRAY, [])]))
    assert GgufFile(write(file_bytes([deep]))).get("k") == [[[[1]]], []]


integers = st.integers(-(2**63), 2**63 - 1).map(lambda i: (I64, i))
floats = st.floats(allow_nan=False).map(lambda x: (F64, x))
strings = st.binary(max_size=40).map(lambda s: (STRING, s))
bools = st.booleans().map(lambda b: (BOOL, b))
keys = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)


def as_python(kind: int, content: Any) -> Any:
    return content.decode(errors="surrogateescape") if kind == STRING else content


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    scalars=st.dictionaries(keys, st.one_of(integers, floats, strings, bools), max_size=8),
    arrays=st.dictionaries(
        keys,
        st.one_of(st.lists(kind, max_size=20) for kind in (integers, floats, strings, bools)),
        max_size=4,
    ),
)
def test_any_metadata(
    scalars: dict[str, Any], arrays: dict[str, Any], write: Callable[..., str]
) -> None:
    pairs = [pair("s" + key, *item) for key, item in scalars.items()]
    expected = {"s" + key: as_python(*item) for key, item in scalars.items()}
    for key, items in arrays.items():
        kind = items[0][0] if items else U8
        pairs.append(pair("a" + key, ARRAY, (kind, [content for _, content in items])))
        expected["a" + key] = [as_python(*item) for item in items]
    assert GgufFile(write(file_bytes(pairs))).metadata == expected


def test_paths(tmp_path: Path) -> None:
    """str, bytes and PathLike, whatever the bytes of the name."""
    small_model(tmp_path / "m.gguf")
    os.rename(tmp_path / "m.gguf", os.fsencode(tmp_path) + b"/m\xff \xe2\x98\x83.gguf")
    name = os.fsencode(tmp_path) + b"/m\xff \xe2\x98\x83.gguf"
    for path in (name, os.fsdecode(name), Path(os.fsdecode(name))):
        assert os.fsencode(GgufFile(path).path) == name  # type: ignore[arg-type]


def test_a_large_vocabulary(tmp_path: Path) -> None:
    """A header of several MB arrives whole over many reads."""
    tokens = [f"token {i} " + "x" * (i % 40) for i in range(100_000)]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-i) for i in range(len(tokens))])
    writer.add_tensor("t", np.arange(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(str(tmp_path / "m.gguf"))
    assert file.get("tokenizer.ggml.tokens") == tokens
    assert file.get("tokenizer.ggml.scores")[-1] == -99_999.0
    content = (tmp_path / "m.gguf").read_bytes()
    offset = file.tensors[0].offset
    assert np.frombuffer(content[offset : offset + 16], np.float32).tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------ what is refused


def test_truncation_at_every_byte(tmp_path: Path, write: Callable[..., str]) -> None:
    small_model(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    last = GgufFile(str(tmp_path / "whole.gguf")).tensors[-1]
    for size in range(len(content)):
        path = write(content[:size])
        if size < last.offset + last.nbytes:
            refused(path, path)
        else:
            assert len(GgufFile(path).tensors) == 4


def test_every_bit_flip_of_the_header(tmp_path: Path, write: Callable[..., str]) -> None:
    """A flipped bit gives an error or another readable file, never a crash."""
    small_model(tmp_path / "whole.gguf")
    content = bytearray((tmp_path / "whole.gguf").read_bytes())
    header = GgufFile(str(tmp_path / "whole.gguf")).tensors[0].offset
    opened = refusals = 0
    for bit in range(header * 8):
        content[bit // 8] ^= 1 << bit % 8
        path = write(bytes(content))
        content[bit // 8] ^= 1 << bit % 8
        try:
            file = GgufFile(path)
        except (ModelFileError, UnsupportedModelError) as error:
            assert "\n" not in str(error)
            assert str(error).startswith(path)
            refusals += 1
            continue
        opened += 1
        assert len(file.metadata) == 19
        assert all(t.offset + t.nbytes <= len(content) for t in file.tensors)
    assert opened > 1000  # letters of keys and strings
    assert refusals > 1000  # counts, lengths, offsets, types


HUGE = 2**63
BROKEN: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["empty file"]),
    "magic": (b"ABCD" + bytes(60), ["expected 'GGUF'", "'ABCD'"]),
    "html": (b"\n<!DOCTYPE html><html>", ["HTML"]),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", ["Git LFS pointer"]),
    "zip": (b"PK\x03\x04" + bytes(60), ["ZIP", "PyTorch"]),
    "pickle": (b"\x80\x02}q\x00" + bytes(60), ["pickle"]),
    "safetensors": (struct.pack("<Q", 70) + b'{"__metadata__":{}}', ["safetensors"]),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.0.1", ["ONNX"]),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(20), ["HDF5"]),
    "tflite": (b"\x1c\x00\x00\x00TFL3" + bytes(20), ["TensorFlow Lite"]),
    "ggml": (b"tjgg" + bytes(20), ["before GGUF"]),
    "json": (b'{"a": 1}', ["JSON"]),
    "metadata count": (file_bytes(n_pairs=HUGE), ["metadata count", str(HUGE)]),
    "tensor count": (file_bytes(n_tensors=HUGE), ["tensor count", str(HUGE)]),
    "tensor count just above": (
        file_bytes([], [entry("t", (1,))], n_tensors=2, data=32),
        ["tensor 1", "expected a name"],
    ),
    "key length": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE) + bytes(40),
        ["metadata key", str(HUGE)],
    ),
    "key empty": (file_bytes([pair("", U8, 1)]) + bytes(8), ["expected a name"]),
    "key twice": (
        file_bytes([pair("general.name", U8, 1), pair("general.name", U8, 2)]),
        ["'general.name'", "found twice"],
    ),
    "value type": (
        file_bytes([text("k") + struct.pack("<I", 13) + bytes(8)]),
        ["'k'", "value type", "13"],
    ),
    "string length": (
        file_bytes([text("k") + struct.pack("<IQ", STRING, 1 << 27) + bytes(9)]),
        ["expected 134217728 bytes", "end of the file"],
    ),
    "string length huge": (
        file_bytes([text("k") + struct.pack("<IQ", STRING, HUGE) + bytes(9)]),
        [str(HUGE)],
    ),
    "bool": (file_bytes([text("k") + struct.pack("<IB", BOOL, 2) + bytes(8)]), ["0 or 1"]),
    "bool in array": (
        file_bytes([text("k") + struct.pack("<IIQ", ARRAY, BOOL, 4) + b"\0\1\2\0"]),
        ["0 or 1", "found 2"],
    ),
    "array length": (
        file_bytes([text("k") + struct.pack("<IIQ", ARRAY, F64, HUGE // 8) + bytes(64)]),
        ["'k'", "elements of type f64"],
    ),
    "array of strings length": (
        file_bytes([text("k") + struct.pack("<IIQ", ARRAY, STRING, 9) + bytes(64)]),
        ["9 elements of type string"],
    ),
    "array depth": (
        file_bytes([pair("k", ARRAY, (ARRAY, [(ARRAY, [(ARRAY, [(ARRAY, [(U8, [1])])])])]))]),
        ["nested at most 4 deep"],
    ),
    "alignment 0": (file_bytes([pair("general.alignment", U32, 0)]), ["power of two", "found 0"]),
    "alignment 48": (file_bytes([pair("general.alignment", U32, 48)]), ["found 48"]),
    "alignment 4": (file_bytes([pair("general.alignment", U32, 4)]), ["found 4"]),
    "alignment 2 MiB": (file_bytes([pair("general.alignment", U32, 1 << 21)]), ["2097152"]),
    "alignment text": (
        file_bytes([pair("general.alignment", STRING, "32")]),
        ["'general.alignment'", "expected an integer", "found string"],
    ),
    "name length": (file_bytes([], [entry("n" * 129, (1,))], data=32), ["tensor name", "129"]),
    "name empty": (file_bytes([], [entry("", (1,))], data=32), ["tensor 0", "expected a name"]),
    "name twice": (
        file_bytes([], [entry("t", (8,)), entry("t", (8,), offset=32)], data=64),
        ["tensor 't'", "found twice"],
    ),
    "no dimensions": (file_bytes([], [entry("t", ())], data=64), ["1 to 4 dimensions", "found 0"]),
    "five dimensions": (file_bytes([], [entry("t", (1,) * 5)], data=64), ["found 5"]),
    "dimension 0": (file_bytes([], [entry("t", (4, 0))], data=64), ["dimension 1 = 0"]),
    "dimension huge": (file_bytes([], [entry("t", (2**32, 2**31))], data=64), ["dimension 1"]),
    "dimension negative": (file_bytes([], [entry("t", (2**64 - 1,))], data=64), ["dimension 0"]),
    "bytes overflow": (file_bytes([], [entry("t", (2**62, 1))], data=64), ["'t'"]),
    "row of blocks": (file_bytes([], [entry("t", (48,), Q4_0)], data=64), ["32 weights (Q4_0)"]),
    "row of super-blocks": (file_bytes([], [entry("t", (32, 8), Q4_K)], data=160), ["256", "32"]),
    "misaligned": (file_bytes([], [entry("t", (4,), offset=8)], data=64), ["multiple of 32"]),
    "misaligned for 64": (
        file_bytes([pair("general.alignment", U32, 64)], [entry("t", (4,), offset=32)], data=128),
        ["multiple of 64, found 32"],
    ),
    "beyond the end": (file_bytes([], [entry("t", (17,))], data=64), ["68 bytes", "truncated"]),
    "offset beyond the end": (
        file_bytes([], [entry("t", (1,), offset=2**63)], data=64),
        ["'t'", str(2**63)],
    ),
    "unknown type beyond the end": (
        file_bytes([], [entry("t", (1,), 999, offset=128)], data=64),
        ["'t'", "truncated"],
    ),
    "unknown type without data": (
        file_bytes([], [entry("t", (1,), 999)]),
        ["'t'", "truncated"],
    ),
    "overlap": (
        file_bytes([], [entry("b", (4,), offset=32), entry("a", (9,))], data=64),
        ["tensor 'b'", "inside tensor 'a'"],
    ),
    "no data": (file_bytes([], [entry("t", (1,))]), ["'t'", "truncated"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str, write: Callable[..., str]) -> None:
    content, words = BROKEN[name]
    path = write(content)
    message = refused(path)
    assert message.startswith(path + ": ")
    assert all(word in message for word in words), message


def test_a_count_that_fits_a_huge_file_is_refused_unread(write: Callable[..., str]) -> None:
    """A damaged length must not pull gigabytes of weights into memory as if they were header."""
    path = write(file_bytes([text("k") + struct.pack("<IIQ", ARRAY, F64, 1 << 29)]))
    os.truncate(path, 8 << 30)  # sparse
    refused(path, "header of at most 256 MiB", "4096 MiB")


@pytest.mark.parametrize(
    ("version", "words"),
    [(1, ["2 or 3", "found 1"]), (4, ["found 4"]), (0, ["found 0"]), (3 << 24, ["big-endian"])],
)
def test_versions_that_are_not_read(
    version: int, words: list[str], write: Callable[..., str]
) -> None:
    refused(write(file_bytes(version=version)), *words, kind=UnsupportedModelError)


def test_control_characters_stay_out_of_messages(write: Callable[..., str]) -> None:
    pairs = [pair(b"a\n\x1b\xff" + b"z" * 500, BOOL, True)]
    content = file_bytes(pairs)[:-1] + b"\x07"
    message = refused(write(content), r"a\x0a\x1b\xffzzz", "...")
    assert len(message) < 400


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    refused(str(tmp_path / "absent.gguf"), "absent.gguf: no such file")
    refused(str(tmp_path), "found a directory")
    refused("", "no such file")
    fifo = tmp_path / "pipe.gguf"
    os.mkfifo(fifo)
    refused(str(fifo), "pipe")
    with pytest.raises(TypeError):
        GgufFile(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="null"):
        GgufFile("a\0b")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all files")
def test_a_file_without_permission(write: Callable[..., str]) -> None:
    path = write(file_bytes())
    os.chmod(path, 0)
    refused(path, "Permission denied")


# ------------------------------------------------------------------ shards


def shard_bytes(
    number: int, count: int, names: list[str], *, total: int = 3, extra: list[bytes] | None = None
) -> bytes:
    """Shard `number` (from 0) of `count`; each tensor has 8 floats."""
    pairs = [
        *(extra or []),
        pair("split.no", U16, number),
        pair("split.count", U16, count),
        pair("split.tensors.count", I32, total),
    ]
    entries = [entry(name, (8,), offset=32 * i) for i, name in enumerate(names)]
    return file_bytes(pairs, entries, data=32 * len(names))


@pytest.fixture
def shards(write: Callable[..., str]) -> list[str]:
    """Three shards of one tensor each."""
    extra = [pair("general.architecture", STRING, "llama")]
    return [
        write(
            shard_bytes(i, 3, [f"t{i}"], extra=extra if i == 0 else None),
            f"m-0000{i + 1}-of-00003.gguf",
        )
        for i in range(3)
    ]


def test_shards(shards: list[str]) -> None:
    file = GgufFile(shards[0])
    assert file.shards == shards
    assert [(t.name, t.shard) for t in file.tensors] == [("t0", 0), ("t1", 1), ("t2", 2)]
    assert file.get("general.architecture") == "llama"
    assert file.nbytes == sum(Path(path).stat().st_size for path in shards)


def test_shards_by_the_gguf_package(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    writer.add_string("k", "v")
    arrays = {f"t{i}": np.full(8, i, np.float32) for i in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(str(path) for path in tmp_path.iterdir())
    file = GgufFile(paths[0])
    assert file.shards == paths
    assert file.get("k") == "v"
    for t in file.tensors:
        content = Path(paths[t.shard]).read_bytes()
        assert content[t.offset : t.offset + t.nbytes] == arrays[t.name].tobytes()
    assert len(file.tensors) == 5


def test_another_shard_than_the_first(shards: list[str]) -> None:
    refused(shards[2], "expected the first shard, found shard 3 of 3", "open " + shards[0])


def test_a_missing_shard_is_named(shards: list[str]) -> None:
    os.remove(shards[1])
    refused(shards[0], shards[1], "no such file", "shard 2 of 3")


def test_a_renamed_first_shard(shards: list[str], write: Callable[..., str]) -> None:
    path = write(Path(shards[0]).read_bytes(), "renamed.gguf")
    refused(path, "-00001-of-00003.gguf", "renamed.gguf")


def test_a_broken_shard_is_named(shards: list[str]) -> None:
    content = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(content[:-1])
    assert refused(shards[0]).startswith(shards[1] + ": ")


def test_shards_that_do_not_fit_together(shards: list[str], write: Callable[..., str]) -> None:
    second = Path(shards[1]).name
    write(shard_bytes(1, 4, ["t1"]), second)
    refused(shards[0], second, "split.count", "expected 3", "found 4")
    write(shard_bytes(2, 3, ["t1"]), second)
    refused(shards[0], second, "split.no", "expected 1, found 2")
    write(shard_bytes(1, 3, ["t1"], total=4), second)
    refused(shards[0], second, "split.tensors.count", "expected 3", "found 4")
    write(shard_bytes(1, 3, ["t1", "u"]), second)
    refused(shards[0], "split.tensors.count", "expected 3 tensors in all shards, found 4")
    write(shard_bytes(1, 3, ["t0"]), second)
    refused(shards[0], second, "tensor 't0'", "found twice")
    write(file_bytes([], [entry("t1", (8,))], data=32), second)
    refused(shards[0], second, "split.count", "expected 3", "found 0")


def test_the_name_counts_the_shards(write: Callable[..., str]) -> None:
    path = write(shard_bytes(0, 2, ["t"], total=1), "m-00001-of-00003.gguf")
    refused(path, "split.count", "expected 3 as in the file name, found 2")
    path = write(file_bytes([], [entry("t", (8,))], data=32), "n-00001-of-00002.gguf")
    refused(path, "split.count", "found no such key")
    one = write(shard_bytes(0, 1, ["t"], total=1), "o-00001-of-00001.gguf")
    assert len(GgufFile(one).tensors) == 1

"""Files with one thing wrong: metadata, tensors, profiles, traces, device profiles.

Each is refused at once with a StokerError, or it loads and generates; the process survives.
The changes are drawn from a fixed seed; STOKER_HYPOTHESIS=search draws more of them.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sample_results
import stoker
from stoker.offload.plan import device_profile
from stoker.offload.plan.forecast import Device
from stoker.offload.profile.profile import make_profile
from stoker.offload.trace.trace import read_trace
from stoker.runtime._core import metadata_keys
from tiny_models import make

SEARCH = os.environ.get("STOKER_HYPOTHESIS") == "search"
COUNT = 3000 if SEARCH else 60  # changes per file
LONGEST_S = 5.0  # limit for a refusal, on a busy machine

FAMILIES = (
    "llama", "llama-moe", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "olmoe", "gemma3",
    "smallthinker",
)  # fmt: skip

# GGUF's ids of value types, as in the specification, and their struct formats.
PACKED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
Value = tuple[int, bytes]  # type and bytes


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, number: float) -> Value:
    return kind, struct.pack("<" + PACKED[kind], number)


def array(kind: int, items: list[bytes]) -> Value:
    return ARRAY, struct.pack("<IQ", kind, len(items)) + b"".join(items)


SCALARS = [
    scalar(kind, number)
    for kind, numbers in {
        0: (0, 255), 1: (-1,), 3: (-1,), 4: (0, 1, 2, 3, 7, 64, 2**31 - 1, 2**31, 2**32 - 1),
        5: (-1, -(2**31)), 6: (0.0, -0.0, 1e-45, 3e38, 0.5, math.nan, math.inf, -math.inf),
        7: (0, 1), 10: (0, 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1), 11: (-1, -(2**63), 2**40),
        12: (0.0, 1e-320, 1e300, -1e300, math.nan, math.inf),
    }.items()
    for number in numbers
]  # fmt: skip
STRINGS: list[Value] = [
    (STRING, text(data))
    for data in (
        b"", b"x", b"\xff\xfe", b"a\0b", b"\n", b"\xed\xa0\x80", b"x" * 100_000, b"none", b"yarn",
        b"linear", b"longrope", b"llama", b"gpt2", b"bert", b"t5", b"rwkv", b"gemma4", b"{{",
        b"{% for x in range(10**9) %}{{ x }}{% endfor %}",
    )
]  # fmt: skip
ARRAYS = [
    *(array(kind, [data] * n) for kind, data in SCALARS[::2] for n in (1, 3)),
    *(array(STRING, items) for items in ([], [text(b"x")], [text(b"\xff")] * 300,
                                         [text(b"a b")] * 3, [text(b"")] * 400)),
    array(4, []), array(ARRAY, []), array(ARRAY, [array(4, [b"\1\0\0\0"])[1]]),
    array(6, [struct.pack("<f", math.nan)] * 400), array(5, [b"\xff" * 4] * 400),
    array(10, [b"\xff" * 8] * 400), (ARRAY, struct.pack("<IQ", 4, 2**61)),
    (ARRAY, struct.pack("<IQ", STRING, 2**40)),
]  # fmt: skip
VALUES = [*SCALARS, *STRINGS, *ARRAYS]
DIMENSIONS = (0, 1, 2, 3, 32, 63, 65, 256, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)
SHAPES = ([], [1], [64], [1] * 5, [2**32, 2**32], [2**31, 2**31, 2])
TYPES = (*range(17), 20, 23, 24, 26, 28, 30, 39, 40, 99, 2**32 - 1)
OFFSETS = (0, 1, 32, 2**31, 2**63, 2**64 - 32, 2**64 - 1)
NAMES = (b"", b"\xff\xfe", b"x", b"\n", b"x" * 200, b"blk.0.attn_q.weight", b"blk.9999999999.x")


@dataclass
class Gguf:
    """A file in parts. metadata: key, type, bytes. tensors: name, shape, type, offset."""

    metadata: list[list[Any]] = field(default_factory=list)
    tensors: list[list[Any]] = field(default_factory=list)
    data: bytes = b""

    def bytes(self) -> bytes:
        out = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.metadata))
        for key, kind, value in self.metadata:
            out += text(key) + struct.pack("<I", kind) + value
        for name, shape, kind, offset in self.tensors:
            out += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            out += struct.pack("<IQ", kind, offset)
        return out + b"\0" * (-len(out) % 32) + self.data


def parts(content: bytes) -> Gguf:
    """The parts of a valid file."""
    _, n_tensors, n_metadata = struct.unpack_from("<IQQ", content, 4)
    at = 24

    def take(form: str) -> Any:
        nonlocal at
        found = struct.unpack_from("<" + form, content, at)
        at += struct.calcsize("<" + form)
        return found[0] if len(found) == 1 else found

    def skip(kind: int) -> None:
        nonlocal at
        if kind == STRING:
            size = take("Q")
            at += size
        elif kind == ARRAY:
            element, count = take("IQ")
            for _ in range(count):
                skip(element)
        else:
            at += struct.calcsize(PACKED[kind])

    def name() -> bytes:
        nonlocal at
        size = take("Q")
        at += size
        return content[at - size : at]

    out = Gguf()
    for _ in range(n_metadata):
        key, kind = name(), take("I")
        begin = at
        skip(kind)
        out.metadata.append([key, kind, content[begin:at]])
    for _ in range(n_tensors):
        called, n = name(), take("I")
        shape = [take("Q") for _ in range(n)]
        out.tensors.append([called, shape, *take("IQ")])
    out.data = content[(at + 31) // 32 * 32 :]
    return out


def keys(file: Gguf) -> list[bytes]:
    """Every key that the engine knows for this file's architecture, and the file's own keys."""
    arch = next(value[8:] for key, _, value in file.metadata if key == b"general.architecture")
    listed = [key.encode().replace(b"{arch}", arch) for key, _, _ in metadata_keys()]
    return sorted({*(k for k in listed if b"{" not in k), *(row[0] for row in file.metadata)})


def changed(right: Gguf, rng: random.Random) -> tuple[Gguf, list[str]]:
    """The file with one or two changes, and their description."""
    file, done = copy.deepcopy(right), []
    for _ in range(rng.choice((1, 1, 1, 2))):
        if rng.random() < 0.6:
            key, (kind, value) = rng.choice(keys(file)), rng.choice(VALUES)
            file.metadata = [row for row in file.metadata if row[0] != key]
            if rng.random() < 0.9:
                file.metadata.append([key, kind, value])
            done.append(f"{key!r} = type {kind}, {value[:40]!r}")
            if key == b"general.architecture":
                break  # it changes the meaning of the other keys
            continue
        row = rng.choice(file.tensors)
        what = rng.choice(("dimension", "shape", "type", "offset", "name", "gone", "twice", "swap"))
        if what == "dimension" and row[1]:
            row[1][rng.randrange(len(row[1]))] = rng.choice(DIMENSIONS)
        elif what == "shape":
            row[1] = rng.choice((*SHAPES, row[1][::-1], row[1][:1], [*row[1], 1]))
        elif what == "type":
            row[2] = rng.choice(TYPES)
        elif what == "offset":
            row[3] = rng.choice((*OFFSETS, len(file.data), len(file.data) - 32))
        elif what == "name":
            row[0] = rng.choice((*NAMES, row[0] + b"\0"))
        elif what == "gone":
            file.tensors.remove(row)
        elif what == "twice":
            file.tensors.append(list(row))
        elif what == "swap":
            row[0], file.tensors[0][0] = file.tensors[0][0], row[0]
        done.append(f"{what}: {row}")
    return file, done


def refused_or_works(call: Callable[[], object], what: object) -> bool:
    """Whether a call works; otherwise it must raise a StokerError soon and in one line."""
    began = time.monotonic()
    try:
        call()
    except (
        stoker.ModelFileError,
        stoker.UnsupportedModelError,
        stoker.TokenizerError,
        stoker.ChatTemplateError,
        stoker.ContextLengthError,
        stoker.OptionError,
    ) as error:
        assert str(error).isprintable() and len(str(error)) < 1000, (what, str(error)[:300])
        # An OptionError is right only if the file limits what an option may be.
        allowed = (
            "context",
            "profile",
            "predictor",
            "no beginning-of-text token",
            "there are no tokens",
        )
        if isinstance(error, stoker.OptionError):
            assert any(word in str(error) for word in allowed), (what, str(error))
        assert time.monotonic() - began < LONGEST_S, what
        return False
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return True


def used(path: Path, what: object) -> None:
    """Uses a model for everything that it can be loaded for."""
    loaded: list[stoker.Model] = []
    if not refused_or_works(lambda: loaded.append(stoker.load(path, threads=1, context=32)), what):
        return
    model = loaded[0]
    calls: tuple[Callable[[], object], ...] = (
        lambda: model.generate("the cat", max_tokens=2, seed=1).read(),
        lambda: model.generate([1, 2], max_tokens=2, temperature=0).read(),
        lambda: model.chat("hi", max_tokens=2).read(),
        lambda: model.embed([1, 2]),
        lambda: (model.metadata, model.config, model.name, model.plan, model.n_vocab),
    )
    for call in calls:
        refused_or_works(call, what)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_other_values(family: str, tmp_path: Path) -> None:
    right = parts(make(tmp_path / "right.gguf", family, context=32).read_bytes())
    assert right.bytes() == (tmp_path / "right.gguf").read_bytes()
    rng = random.Random(family if not SEARCH else time.time())
    path = tmp_path / "other.gguf"
    for _ in range(COUNT):
        file, what = changed(right, rng)
        path.write_bytes(file.bytes())
        used(path, what)


@pytest.mark.parametrize("key", [key for key, _, _ in metadata_keys() if "{" not in key])
def test_every_key_of_the_tokenizer(key: str, tmp_path: Path) -> None:
    """Each key that the engine reads for every architecture gets a share of the values."""
    right = parts(make(tmp_path / "right.gguf", "llama", n_layer=1, context=32).read_bytes())
    share = zlib.crc32(key.encode()) % 16
    for kind, value in VALUES[share::16]:
        file = copy.deepcopy(right)
        file.metadata = [row for row in file.metadata if row[0] != key.encode()]
        file.metadata.append([key.encode(), kind, value])
        path = tmp_path / "other.gguf"
        path.write_bytes(file.bytes())
        used(path, (key, kind, value[:40]))


def test_long_names_are_cut(tmp_path: Path) -> None:
    right = parts(make(tmp_path / "right.gguf", "llama").read_bytes())
    for row in right.metadata:
        if row[0] == b"general.architecture":
            row[2] = text(b"x" * 50_000 + b"\xff")
    (tmp_path / "long.gguf").write_bytes(right.bytes())
    with pytest.raises(stoker.UnsupportedModelError, match=r"found x{100}\.\.\.") as caught:
        stoker.load(tmp_path / "long.gguf")
    assert len(str(caught.value)) < 600


# JSON: one value of a document replaced, or left out.

JSON_VALUES = (
    None, True, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, -1e308, 5e-324, "", "x",
    "\ud800", "\n", "x" * 3000, [], {}, [1], ["x"], [None], {"x": 1}, [{}], math.nan, math.inf,
)  # fmt: skip


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(document, dict):
        inner: Any = document.items()
    else:
        inner = enumerate(document) if isinstance(document, list) else ()
    for key, value in inner:
        yield (*at, key)
        yield from places(value, (*at, key))


def replaced(document: Any, rng: random.Random) -> tuple[Any, str]:
    document = copy.deepcopy(document)
    *way, last = rng.choice(list(places(document)))
    inside = document
    for key in way:
        inside = inside[key]
    if rng.random() < 0.2:
        del inside[last]
        return document, f"without {way} {last}"
    inside[last] = rng.choice(JSON_VALUES)
    return document, f"{way} {last} = {inside[last]!r:.60}"


def in_tree(call: Callable[[], object], what: object) -> None:
    try:
        call()
    except stoker.StokerError as error:
        assert str(error).isprintable() and len(str(error)) < 600, (what, str(error)[:300])
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def test_device_profiles_with_other_values(tmp_path: Path) -> None:
    right = sample_results.profile(sample_results.LAPTOP)
    path, rng = tmp_path / "device.json", random.Random(7)

    def forecast() -> None:
        device = Device(device_profile.load(path))  # type: ignore[arg-type]
        for speed in (device.memory_bytes_s, device.float_ops_s, device.fresh_bytes_s):
            assert 0 < speed < math.inf
        assert device.available is None or device.available >= 0
        assert 0 < device.expert_bytes_s(1 << 20) < math.inf
        assert 0 < device.row_weights_s("Q4_0", 4.5) < math.inf

    for _ in range(10 * COUNT):
        document, what = replaced(right, rng)
        path.write_text(json.dumps(document))
        in_tree(forecast, what)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A mixture of experts and its profile."""
    folder = tmp_path_factory.mktemp("mixture")
    path = make(folder / "mixture.gguf", "qwen3moe", n_layer=2, context=64)
    made = folder / "right.profile"
    make_profile(
        stoker.load(path, threads=1), made, text="the cat sat on the mat " * 60, tokens=256
    )
    return path, made


def test_profiles_with_other_values(mixture: tuple[Path, Path], tmp_path: Path) -> None:
    model_path, right = mixture
    content = right.read_bytes()
    (size,) = struct.unpack_from("<Q", content, 8)
    header, states = json.loads(content[16 : 16 + size]), content[16 + size :]
    path, rng = tmp_path / "other.profile", random.Random(3)

    def write(header: object, states: bytes) -> None:
        data = json.dumps(header).encode()
        path.write_bytes(content[:8] + struct.pack("<Q", len(data)) + data + states)

    for _ in range(COUNT):
        predictor = rng.choice(("linear", "path", "transition"))
        if rng.random() < 0.5:
            document, what = replaced(header, rng)
            write(document, states)
        else:  # a state that is complete but wrong
            document, what = copy.deepcopy(header), predictor
            offset, nbytes, _ = header["sections"][predictor]
            state = bytearray(states[offset : offset + nbytes])
            at = rng.randrange(min(len(state), rng.choice((32, len(state)))))
            state[at : at + 4] = rng.choice((b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b""))
            state = state[: rng.choice((len(state), rng.randrange(len(state))))]
            document["sections"][predictor] = [0, len(state), zlib.crc32(bytes(state))]
            write(document, bytes(state))

        def speak(predictor: str = predictor) -> None:
            model = stoker.load(
                model_path, threads=1, context=32, memory="64GiB", predictor=predictor,
                profile=path, prefetch="on",
            )  # fmt: skip
            model.generate("the cat", max_tokens=2, seed=1).read()

        refused_or_works(speak, what)


def test_traces_with_other_values(tmp_path: Path) -> None:
    lines = ["# n_layer=2 n_expert=4 n_expert_used=2", "# layer=0 expert_bytes=100",
             "step,phase,layer,slot,expert,weight,hit,wait_us,token"]  # fmt: skip
    for step in range(6):
        for layer in range(2):
            lines += [f"{step},decode,{layer},{k},{(step + k) % 4},0.5,1,0,{step}" for k in (0, 1)]
    documents = [json.dumps({"tok": t, "layers": [[t % 4, 3 - t % 4 or 1]]}) for t in range(1, 3)]
    pieces = (
        b"",
        b"-1",
        b"9" * 25,
        b"nan",
        b"\xff",
        b"\0",
        b",",
        b"\n",
        b"{",
        b"[" * 9999,
        b"null",
    )
    path, rng = tmp_path / "trace.csv", random.Random(5)
    for right in ("\n".join(lines).encode(), "\n".join(documents).encode()):
        for _ in range(5 * COUNT):
            begin = rng.randrange(len(right))
            other = right[:begin] + rng.choice(pieces) + right[begin + rng.choice((0, 1, 9)) :]
            path.write_bytes(b"\x1f\x8b" * rng.choice((0, 0, 0, 1)) + other)
            in_tree(lambda: read_trace(path), other[max(begin - 40, 0) : begin + 40])

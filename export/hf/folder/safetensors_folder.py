"""The weights of a Hugging Face folder: safetensors shards, read piece by piece.

A shard is a little-endian u64 n, n bytes of JSON ({name: {dtype, shape, data_offsets}}) and the
data that the offsets count from, without gaps. Tensors are row-major. Headers come from strangers:
all sizes and offsets are checked before anything is read. Source: the safetensors format
description.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....runtime.base.errors import ModelFileError
from ....runtime.files.whole_file import MOST_TEXT, read_whole

INDEX = "model.safetensors.index.json"

_HEADER_LIMIT = 100_000_000  # bytes; the limit of the format's own library, too
# Bits of an element; types without a whole number of bytes are not weights that GGUF could hold.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32,
    "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class ShardTensor:
    """A tensor of a shard. shape: row-major; offset: its first byte in the file."""

    name: str
    dtype: str  # as the format spells it: F32, F16, BF16, ...
    shape: tuple[int, ...]
    shard: Path
    offset: int
    nbytes: int

    @property
    def cols(self) -> int:
        """Elements of the last dimension (1 for a scalar)."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Product of all other dimensions."""
        return math.prod(self.shape[:-1])


class SafetensorsFolder:
    """All tensors of a folder's shards, by name."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers only. ModelFileError if a shard is missing or makes no sense."""
        self.folder = folder
        weight_map = _index(folder / INDEX)
        self.shards: tuple[Path, ...] = _shards(folder, weight_map)
        self.tensors: dict[str, ShardTensor] = {}
        for shard in self.shards:
            for tensor in read_header(shard):
                before = self.tensors.get(tensor.name)
                if before is not None:
                    raise ModelFileError(
                        f"{shard}: tensor {tensor.name}: expected in one shard, found in "
                        f"{before.shard.name} too"
                    )
                self.tensors[tensor.name] = tensor
        for name, file in (weight_map or {}).items():
            found = self.tensors.get(name)
            if found is None or found.shard.name != file:
                where = "nowhere" if found is None else f"in {found.shard.name}"
                raise ModelFileError(
                    f"{folder / INDEX}: tensor {name}: expected in {file}, found {where}"
                )
        self._files: dict[Path, int] = {}

    def read(self, tensor: ShardTensor, first_row: int, rows: int) -> npt.NDArray[np.uint8]:
        """The bytes of rows [first_row, first_row + rows) of a tensor.

        What has been read is dropped from the page cache again: a folder is read once, and cached
        pages count against a memory limit. ModelFileError if the file has become shorter,
        OSError.
        """
        row_bytes = tensor.nbytes // max(1, tensor.rows)
        begin, size = tensor.offset + first_row * row_bytes, rows * row_bytes
        fd = self._open(tensor.shard)
        data = np.empty(size, np.uint8)
        view, done = data.data, 0
        while done < size:
            found = _read_at(fd, view[done:], begin + done)
            if found == 0:
                raise ModelFileError(
                    f"{tensor.shard}: expected {begin + size} bytes, found {begin + done}"
                )
            done += found
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(fd, begin, size, os.POSIX_FADV_DONTNEED)
        return data

    def _open(self, shard: Path) -> int:
        fd = self._files.get(shard)
        if fd is None:
            self.close()  # one open shard at a time: folders of hundreds of shards exist
            fd = os.open(shard, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            if hasattr(os, "posix_fadvise"):
                with suppress(OSError):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._files[shard] = fd
        return fd

    def close(self) -> None:
        """Closes the shard that is open; reading opens it again."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def identity(self) -> list[tuple[str, int, int]]:
        """(name, bytes, time of change in ns) of every shard: changes when a shard does."""
        stats = [(shard.name, shard.stat()) for shard in self.shards]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _read_at(fd: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    os.lseek(fd, offset, os.SEEK_SET)
    data = os.read(fd, len(view))
    view[: len(data)] = data
    return len(data)


def _index(path: Path) -> dict[str, str] | None:
    """The index's weight_map (tensor -> file name), None if there is no index."""
    if not path.is_file():
        return None
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{path}: weight_map: expected {{tensor: file}}, found none")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
            raise ModelFileError(
                f"{path}: tensor {name}: expected the name of a .safetensors file in this "
                f"folder, found {file!r:.80}"
            )
    return weight_map


def _shards(folder: Path, weight_map: Mapping[str, str] | None) -> tuple[Path, ...]:
    if weight_map is not None:
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise ModelFileError(
                f"{folder}: expected {len(shards)} shards, found {len(shards) - len(missing)} "
                f"(missing: {_some(missing)})"
            )
        return tuple(shards)
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    shards = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not shards:
        others = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt*")])
        found = _some(others) if others else "none"
        raise ModelFileError(f"{folder}: expected *.safetensors, found {found}")
    _check_numbering(folder, shards)
    return tuple(shards)


def _check_numbering(folder: Path, shards: Sequence[Path]) -> None:
    """Checks that of shards called ...-00001-of-00003 all are there."""
    names = {shard.name for shard in shards}
    for name in sorted(names):
        match = re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\.safetensors)", name)
        if match is None:
            continue
        head, digits, total, tail = match[1], len(match[2]), match[3], match[4]
        if len(total) > 6:
            continue
        expected = [f"{head}{i:0{digits}}-of-{total}{tail}" for i in range(1, int(total) + 1)]
        missing = [n for n in expected if n not in names]
        if missing:
            raise ModelFileError(
                f"{folder}: expected {int(total)} shards, found {int(total) - len(missing)} "
                f"(missing: {_some(missing)})"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object. ModelFileError if it does not."""
    return _object(path, _content(path))


def read_json_array(path: Path) -> list[Any]:
    """A JSON file that must hold an array. ModelFileError if it does not."""
    value = _value(path, _content(path))
    if not isinstance(value, list):
        raise ModelFileError(f"{path}: expected a JSON array, found {type(value).__name__}")
    return value


def _content(path: Path) -> bytes:
    try:
        return read_whole(path, MOST_TEXT)
    except OSError as error:
        raise ModelFileError(f"{path}: expected a JSON file, found: {error.strerror}") from None


def _object(path: Path, data: bytes) -> dict[str, Any]:
    value = _value(path, data)
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _value(path: Path, data: bytes) -> Any:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r:.80} twice")
        return found

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=distinct)
    except RecursionError:
        raise ModelFileError(f"{path}: expected JSON, found too deep a nesting") from None
    except ValueError as error:
        raise ModelFileError(f"{path}: expected JSON, found: {error!s:.200}") from None


def read_header(path: Path) -> list[ShardTensor]:
    """The tensors of one shard, in the order of their data. ModelFileError, in one line."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            n = int.from_bytes(head, "little")
            if len(head) < 8 or n > size - 8:
                raise ModelFileError(
                    f"{path}: expected a safetensors header of {n} bytes, found a file of {size}"
                )
            if n > _HEADER_LIMIT:
                raise ModelFileError(
                    f"{path}: expected a header of at most {_HEADER_LIMIT} bytes, found {n}"
                )
            header = _object(path, file.read(n))
    except OSError as error:
        raise ModelFileError(f"{path}: expected a shard, found: {error.strerror}") from None
    header.pop("__metadata__", None)
    begin = 8 + n
    tensors = sorted(_tensors(path, header, begin), key=lambda t: (t.offset, t.nbytes))
    at = begin
    for tensor in tensors:
        if tensor.offset != at:
            raise ModelFileError(
                f"{path}: tensor {tensor.name}: expected data at {at - begin}, "
                f"found at {tensor.offset - begin}"
            )
        at += tensor.nbytes
    if at != size:
        raise ModelFileError(f"{path}: expected {at} bytes, found {size}")
    return tensors


def _tensors(path: Path, header: Mapping[str, Any], begin: int) -> Iterator[ShardTensor]:
    for name, row in header.items():
        where = f"{path}: tensor {name!r:.120}"
        if not isinstance(row, dict):
            raise ModelFileError(f"{where}: expected an object, found {type(row).__name__}")
        dtype = row.get("dtype")
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise ModelFileError(f"{where}: expected a known dtype, found {dtype!r:.40}")
        shape = _counts(row.get("shape"))
        if shape is None or len(shape) > 8:
            raise ModelFileError(f"{where}: expected a shape, found {row.get('shape')!r:.80}")
        offsets = _counts(row.get("data_offsets"))
        if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise ModelFileError(
                f"{where}: expected two data_offsets, found {row.get('data_offsets')!r:.80}"
            )
        bits = math.prod(shape) * _BITS[dtype]
        nbytes = offsets[1] - offsets[0]
        if bits != 8 * nbytes:
            raise ModelFileError(
                f"{where}: expected {bits // 8} bytes for {dtype} {shape}, found {nbytes}"
            )
        yield ShardTensor(name, dtype, tuple(shape), path, begin + offsets[0], nbytes)


def _counts(value: object) -> list[int] | None:
    """The value if it is a list of integers >= 0 that fit an offset, else None."""
    if isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        return value
    return None

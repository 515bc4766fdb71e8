"""Writing of GGUF files: header and directory, and a file that appears only when it is complete.

Layout (version 3, little-endian): "GGUF", u32 version, u64 tensors, u64 metadata entries; entries
of {string key, u32 type, value}; directory rows of {string name, u32 dimensions, u64 size of
each, u32 type, u64 offset}; the data section, aligned, that the offsets count from. A string is a
u64 length and its bytes; an array a u32 element type, a u64 count and its elements. Source: the
GGUF specification of the ggml project.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.base.errors import DeviceError
from ...runtime.files.json_text import parse
from .direct_file import DirectFile, page_start

_STRING, _ARRAY = 8, 9
# Bytes of the value types that have a fixed size: u8 i8 u16 i16 u32 i32 f32 bool u64 i64 f64.
_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_ALIGNMENT_KEY = "general.alignment"
_DIRECT_BYTES = 1 << 20  # from this size of a write on it is worth going past the page cache


def u32(value: int) -> bytes:
    """An encoded metadata value of type u32: its type and its bytes."""
    return struct.pack("<II", 4, value)


def string(text: str) -> bytes:
    """An encoded metadata value of type string."""
    return struct.pack("<I", _STRING) + _text(text)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def read_metadata(path: str | Path) -> dict[str, bytes]:
    """Every metadata entry of a GGUF file as the bytes of its type and value, in file order.

    path: a file that `GgufFile` has opened, and thereby checked.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:

        def end_of(kind: int, at: int) -> int:
            if kind == _STRING:
                return at + 8 + int(struct.unpack_from("<Q", data, at)[0])
            if kind != _ARRAY:
                return at + _FIXED[kind]
            element, count = struct.unpack_from("<IQ", data, at)
            at += 12
            if element in _FIXED:
                return at + _FIXED[element] * int(count)
            for _ in range(count):
                at = end_of(element, at)
            return at

        entries: dict[str, bytes] = {}
        at = 24
        for _ in range(struct.unpack_from("<Q", data, 16)[0]):
            key_end = end_of(_STRING, at)
            key = data[at + 8 : key_end].decode("utf-8", "surrogateescape")
            (kind,) = struct.unpack_from("<I", data, key_end)
            at = end_of(kind, key_end + 4)
            entries[key] = data[key_end:at]
        return entries


@dataclass(frozen=True)
class Tensor:
    """A row of the directory. shape[0] is the contiguous dimension; type is the GGUF id."""

    name: str
    shape: tuple[int, ...]
    type: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Positions in a file: header bytes, tensors' first bytes by name, size of the file."""

    header: bytes
    offsets: Mapping[str, int]
    size: int


def _aligned(n: int, metadata: Mapping[str, bytes]) -> int:
    alignment = 32
    if _ALIGNMENT_KEY in metadata:
        alignment = struct.unpack("<I", metadata[_ALIGNMENT_KEY][4:])[0]
    return -(-n // alignment) * alignment


def layout(metadata: Mapping[str, bytes], tensors: Sequence[Tensor]) -> Layout:
    """The layout of a file with these entries (encoded) and tensors, in their order."""
    begin = len(header(metadata, tensors, None))
    offsets, end = {}, begin
    for tensor in tensors:
        offsets[tensor.name] = end
        end = begin + _aligned(end - begin + tensor.nbytes, metadata)
    return Layout(header(metadata, tensors, offsets), offsets, end)


def header(
    metadata: Mapping[str, bytes],
    tensors: Sequence[Tensor],
    offsets: Mapping[str, int] | None,
) -> bytes:
    """All bytes before the data, for tensors at these aligned offsets of the file.

    offsets: None leaves them 0, to measure the header's length.
    """
    fixed = sum(len(_text(t.name)) + 8 * len(t.shape) + 16 for t in tensors)
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    parts += [_text(key) + value for key, value in metadata.items()]
    begin = _aligned(sum(map(len, parts)) + fixed, metadata)
    for tensor in tensors:
        at = 0 if offsets is None else offsets[tensor.name] - begin
        parts.append(_text(tensor.name))
        parts.append(struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape))
        parts.append(struct.pack("<IQ", tensor.type, at))
    return b"".join(parts).ljust(begin, b"\0")


class PartFile:
    """An unfinished file: `.NAME.part`, and `.NAME.part.json`, which records the progress.

    It takes its name only when it is complete and on the disk. One that an interruption left is
    taken up again if the recipe (a digest of all that decides the bytes) is the same.
    """

    def __init__(self, path: Path, size: int, recipe: str) -> None:
        """Opens or makes the part of `path`, of `size` bytes; all its space is allocated at once.

        Raises DeviceError if the disk is too small, OSError.
        """
        self.path = path
        self.part = path.with_name(f".{path.name}.part")
        self._journal = path.with_name(f".{path.name}.part.json")
        self._recipe = recipe
        self._size = size
        self.done = self._resumable()  # steps that are on the disk
        if self.done == 0:
            self.discard()
        self._file = open(self.part, "r+b" if self.done else "w+b", buffering=0)  # noqa: SIM115
        try:
            self._allocate()
        except BaseException:
            self._file.close()
            if self.done == 0:
                self.discard()
            raise
        self._direct = DirectFile.open(self.part)

    def _resumable(self) -> int:
        try:
            state: dict[str, Any] = parse(self._journal.read_text())
            if state["recipe"] == self._recipe and self.part.stat().st_size == self._size:
                return int(state["done"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return 0

    def _allocate(self) -> None:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, self._size)
            else:
                self._file.truncate(self._size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise self._explained(error) from error
            self._file.truncate(self._size)

    def _explained(self, error: OSError) -> OSError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        folder = self.path.parent
        free = shutil.disk_usage(folder).free
        return DeviceError(
            f"no space left in {folder}: {self._size / 1e6:.0f} MB needed for {self.path.name}, "
            f"{free / 1e6:.0f} MB free"
        )

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Writes data at a byte offset."""
        view = memoryview(data).cast("B")
        try:
            if len(view) >= _DIRECT_BYTES and self._direct is not None:
                head = page_start(offset) - offset  # a page shared with other bytes is cached
                self._cached(offset, view[:head])
                done = head + self._direct.write(offset + head, view[head:])
                offset, view = offset + done, view[done:]
            self._cached(offset, view)
        except OSError as error:
            raise self._explained(error) from error

    def _cached(self, offset: int, view: memoryview) -> None:
        self._file.seek(offset)
        while len(view):
            view = view[self._file.write(view) :]

    def commit(self, done: int) -> None:
        """Flushes all that was written to the disk, then records that `done` steps are there."""
        try:
            os.fsync(self._file.fileno())
            fresh = self._journal.with_suffix(".new")
            fresh.write_text(json.dumps({"recipe": self._recipe, "done": done}))
            os.replace(fresh, self._journal)
        except OSError as error:
            raise self._explained(error) from error
        self.done = done

    def finish(self) -> None:
        """Gives the file its name."""
        os.fsync(self._file.fileno())
        self._close()
        os.replace(self.part, self.path)
        self._journal.unlink(missing_ok=True)
        if hasattr(os, "O_DIRECTORY"):
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def close(self) -> None:
        """Closes the part: keeps it if a step is on the disk, else removes it."""
        self._close()
        if self.done == 0:
            self.discard()

    def _close(self) -> None:
        if self._direct is not None:
            self._direct.close()
            self._direct = None
        self._file.close()

    def discard(self) -> None:
        """Removes the part and its journal."""
        for path in (self.part, self._journal, self._journal.with_suffix(".new")):
            with suppress(FileNotFoundError):
                path.unlink()

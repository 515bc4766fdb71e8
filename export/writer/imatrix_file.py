"""Importance matrices: how much an error in each column of a weight matrix matters.

The importance of a column is the mean square of the activation that it multiplies, over a text.
Files are exchangeable with llama.cpp: a GGUF file of general.type "imatrix" with, for each matrix,
`<name>.in_sum2` [cols, experts or 1], sums of squares, and `<name>.counts` [1, experts or 1],
tokens; the older .dat form is read too: i32 entries; of each i32 length and bytes of its name,
i32 calls, i32 values, f32 values; then i32 chunks, i32 length and bytes of the text's name.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ...runtime.base.errors import ModelFileError
from ...runtime.files.whole_file import read_whole
from . import gguf_writer
from .gguf_writer import Tensor
from .model_writer import read_bytes, write_model

_SUMS, _COUNTS = ".in_sum2", ".counts"
_ARRAY, _STRING = 9, 8

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Entry:
    """Sums over one matrix's inputs: of squares [experts or 1, cols], of tokens [experts or 1]."""

    sums: Floats
    counts: Floats


@dataclass(frozen=True)
class Imatrix:
    """The entries by tensor name, and the text that they come from.

    chunks: evaluations of `chunk_size` tokens. path: the file's, for messages.
    """

    entries: Mapping[str, Entry]
    datasets: Sequence[str] = field(default=())
    chunks: int = 0
    chunk_size: int = 0
    path: str = ""

    @property
    def names(self) -> Sequence[str]:
        """The tensors that have an entry."""
        return list(self.entries)

    @property
    def digest(self) -> str:
        """A digest of all values."""
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name} {entry.sums.shape} ".encode())
            digest.update(entry.sums.tobytes() + entry.counts.tobytes())
        return digest.hexdigest()

    def of(self, name: str, shape: Sequence[int]) -> Floats | None:
        """The importances of a tensor of this shape (shape[0] columns): [experts or 1, cols].

        None if the file has none. An expert that no token chose gets the mean of the others.
        Raises ModelFileError if the entry is for another shape.
        """
        entry = self.entries.get(name)
        if entry is None or not entry.counts.any():
            return None
        slices = math.prod(shape[2:])
        if entry.sums.shape == (1, shape[0] * slices):  # the .dat form does not separate experts
            counts = np.repeat(entry.counts, slices)
            entry = Entry(entry.sums.reshape(slices, shape[0]), counts)
        experts, cols = entry.sums.shape
        if cols != shape[0] or experts not in (1, slices):
            raise ModelFileError(
                f"{self.path}: tensor {name}: expected importances of [{shape[0]}, {slices}], "
                f"found [{cols}, {experts}]"
            )
        seen = entry.counts > 0
        means = entry.sums / np.where(seen, entry.counts, np.float32(1))[:, None]
        means[~seen] = means[seen].mean(axis=0)
        return np.ascontiguousarray(means, dtype=np.float32)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Imatrix:
        """Reads either form. Raises ModelFileError."""
        name = os.fspath(path)
        try:
            with open(name, "rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise ModelFileError(f"{name}: {error.strerror or error}") from error
        found = _read_gguf(name) if magic == b"GGUF" else _read_dat(name)
        for tensor, entry in found.entries.items():
            if not all(np.isfinite(v).all() and (v >= 0).all() for v in (entry.sums, entry.counts)):
                raise ModelFileError(
                    f"{name}: tensor {tensor}: expected finite importances >= 0, found others"
                )
        return found

    def write(self, out: str | os.PathLike[str], *, force: bool = False) -> int:
        """Writes the GGUF form; returns its bytes. Raises OptionError, DeviceError."""
        u32, string = gguf_writer.u32, gguf_writer.string
        names = [string(text)[4:] for text in self.datasets]
        metadata = {
            "general.type": string("imatrix"),
            "imatrix.datasets": struct.pack("<IIQ", _ARRAY, _STRING, len(names)) + b"".join(names),
            "imatrix.chunk_count": u32(self.chunks),
            "imatrix.chunk_size": u32(self.chunk_size),
        }
        data: dict[str, bytes] = {}
        tensors = []
        for name in sorted(self.entries):
            entry = self.entries[name]
            experts, cols = entry.sums.shape
            data[name + _SUMS] = entry.sums.tobytes()
            data[name + _COUNTS] = entry.counts.tobytes()
            tensors.append(Tensor(name + _SUMS, (cols, experts), 0, entry.sums.nbytes))
            tensors.append(Tensor(name + _COUNTS, (1, experts), 0, entry.counts.nbytes))

        def source(tensor: Tensor, start: int) -> Iterator[bytes]:
            yield data[tensor.name][start:]

        return write_model(out, metadata, tensors, source, recipe=self.digest, force=force)


def _read_gguf(path: str) -> Imatrix:
    from ...runtime._core import GgufFile

    file = GgufFile(path)
    kind = file.get("general.type")
    if kind != "imatrix":
        raise ModelFileError(f"{path}: general.type: expected imatrix, found {kind}")
    found: dict[str, Floats] = {}
    for t in file.tensors:
        if t.type != "F32":
            raise ModelFileError(f"{path}: tensor {t.name}: expected type F32, found {t.type}")
        data = read_bytes(file.shards[t.shard], t.offset, t.nbytes).view(np.float32)
        found[t.name] = data.reshape(-1, t.shape[0])
    entries = {}
    for name, sums in found.items():
        if not name.endswith(_SUMS):
            continue
        tensor = name.removesuffix(_SUMS)
        counts = found.get(tensor + _COUNTS)
        if counts is None or counts.size != len(sums):
            raise ModelFileError(f"{path}: expected {len(sums)} values of {tensor}{_COUNTS}")
        entries[tensor] = Entry(sums, counts.reshape(-1))
    if not entries:
        raise ModelFileError(f"{path}: expected tensors named *{_SUMS}, found none")
    datasets = file.get("imatrix.datasets") or []
    return Imatrix(
        entries,
        [str(d) for d in datasets] if isinstance(datasets, list) else [],
        int(file.get("imatrix.chunk_count") or 0),
        int(file.get("imatrix.chunk_size") or 0),
        path,
    )


def _read_dat(path: str) -> Imatrix:
    data = read_whole(path)
    at = 0

    def number() -> int:
        nonlocal at
        (value,) = struct.unpack_from("<i", data, at)
        at += 4
        return int(value)

    def take(n: int) -> bytes:
        nonlocal at
        if not 0 <= n <= len(data) - at:
            raise ValueError
        at += n
        return data[at - n : at]

    entries: dict[str, Entry] = {}
    datasets: list[str] = []
    chunks = 0
    try:
        for _ in range(number()):
            name = take(number()).decode()
            calls, n = number(), number()
            values = np.frombuffer(take(4 * n), dtype="<f4").astype(np.float32)
            # Only the tensor's shape tells how many experts these are for (`of`).
            entries[name] = Entry(values[None, :], np.array([max(calls, 1)], dtype=np.float32))
        if not entries:
            raise ValueError
        if at < len(data):
            chunks = number()
            datasets.append(take(number()).decode())
    except (ValueError, struct.error):
        raise ModelFileError(f"{path}: expected an importance matrix, found other data") from None
    return Imatrix(entries, datasets, chunks, 0, path)

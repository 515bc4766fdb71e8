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
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..runtime.checked_call import checked
from ..runtime.errors import ModelFileError, OptionError
from ..runtime.output_file import check_output
from ..runtime.whole_file import read_whole
from . import gguf_writer
from .gguf_writer import Tensor
from .hidden_states import Progress
from .model_writer import read_bytes, write_model

_SUMS, _COUNTS = ".in_sum2", ".counts"
_ARRAY, _STRING = 9, 8

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Entry:
    """What one matrix saw: sums of squares [experts or 1, cols], tokens [experts or 1]."""

    sums: Floats
    counts: Floats


@dataclass(frozen=True)
class Imatrix:
    """The entries by tensor name, and the text that they come from.

    chunks: evaluations of `chunk_size` tokens. path: of the file, for messages.
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

        None where the file has none. An expert that no token chose gets the mean of the others.
        Raises ModelFileError where the entry is for another shape.
        """
        entry = self.entries.get(name)
        if entry is None or not entry.counts.any():
            return None
        slices = math.prod(shape[2:])
        if entry.sums.shape == (1, shape[0] * slices):  # the .dat form does not tell them apart
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
    from ..runtime._core import GgufFile

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
            # How many experts these are for, only the tensor's shape will tell (`of`).
            entries[name] = Entry(values[None, :], np.array([max(calls, 1)], dtype=np.float32))
        if not entries:
            raise ValueError
        if at < len(data):
            chunks = number()
            datasets.append(take(number()).decode())
    except (ValueError, struct.error):
        raise ModelFileError(f"{path}: expected an importance matrix, found other data") from None
    return Imatrix(entries, datasets, chunks, 0, path)


@checked
def collect(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    text: str,
    *,
    name: str = "text",
    chunk: int = 512,
    max_chunks: int | None = None,
    memory: str | int = "auto",
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Imatrix, float]:
    """Measures what every matrix of a model multiplies with on a text, and writes the file.

    chunk: tokens that see each other; each chunk begins with the model's BOS token where it has
    one; a rest shorter than a chunk is left out (a text shorter than one is one chunk). name: of
    the text, noted in the file. memory: budget of the model while it runs. The output matrix counts
    all tokens. Returns the matrix and the text's perplexity. progress: called with "text", chunks
    done, chunks in all.
    Raises OptionError, ModelFileError, UnsupportedModelError, DeviceError.
    """
    from ..runtime._core import ActivationSums
    from ..runtime.model import Model
    from ..runtime.options import LoadOptions

    path = Path(source)
    check_output(Path(out), [path] if path.exists() else [], force=force)
    if chunk < 2:
        raise OptionError(f"chunk: expected at least 2 tokens, found {chunk}")
    if max_chunks is not None and max_chunks < 1:
        raise OptionError(f"chunks: expected at least 1, found {max_chunks}")
    model = Model(
        path, LoadOptions(threads=threads, context=chunk, precision="high", memory=memory)
    )
    tokens = np.array(model.tokenizer.encode(text, add_special=True), dtype=np.int32)
    if len(tokens) < 2:
        raise OptionError(f"text: expected at least 2 tokens, found {len(tokens)}")
    bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    begins = list(range(0, len(tokens) - chunk + 1, chunk)) or [0]
    begins = begins[:max_chunks]
    timeline = model._engine.timeline()
    sums = ActivationSums(model._engine)
    total, count = 0.0, 0
    for done, begin in enumerate(begins, 1):
        window = tokens[begin : begin + chunk].copy()
        if bos is not None:
            window[0] = bos
        timeline.truncate(0)
        nll = sums.eval(timeline, window)
        total, count = total + float(nll.sum()), count + len(nll)
        if progress is not None:
            progress("text", done, len(begins))
    entries = {
        tensor: Entry(squares.astype(np.float32), counts.astype(np.float32))
        for tensor, (squares, counts) in sums.tensors.items()
        if counts.any()
    }
    found = Imatrix(entries, [name], len(begins), min(chunk, len(tokens)), os.fspath(out))
    for tensor, entry in entries.items():
        if not np.isfinite(entry.sums).all():
            raise ModelFileError(f"{path}: tensor {tensor}: the model computes values not finite")
    found.write(out, force=force)
    return found, math.exp(min(total / max(count, 1), 700.0))

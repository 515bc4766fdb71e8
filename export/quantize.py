"""Quantization of a model's weights to llama.cpp's file types, streamed.

Tensors pass in pieces of a few million weights (read, quantized on all cores, written), so that the
model may be far larger than memory.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..runtime.base.checked_call import checked
from ..runtime.base.errors import ModelFileError, UnsupportedModelError
from ..runtime.base.progress import Progress
from .writer import gguf_writer, mixes
from .writer.gguf_writer import Tensor
from .writer.imatrix_file import Imatrix
from .writer.model_writer import piece_rows, read_ahead, read_bytes, resumable_part, write_model
from .writer.tensor_types import format_row

if TYPE_CHECKING:
    from ..runtime._core import GgufFile, TensorInfo

__all__ = ["Quantized", "model_sizes", "quantize", "resumable_part"]

_RECIPE_VERSION = 1  # changes if the same arguments make other bytes
_QUANTIZATION_VERSION = 2  # version of ggml's block formats


@dataclass(frozen=True)
class Quantized:
    """The result: the file, its bytes, tensors by type, notes for the user."""

    path: Path
    nbytes: int
    source_nbytes: int
    types: Mapping[str, int]  # tensor type -> tensors
    notes: Sequence[str]


@checked
def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    type: str,
    overrides: Sequence[tuple[str, str]] = (),
    imatrix: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Writes the model of a GGUF file (or of the first of its shards) with other tensor types.

    type: a file type (mixes.FILE_TYPES). overrides: (glob, tensor type), such as
    ("blk.*.ffn_down", "Q6_K"). imatrix: a file of `stoker export imatrix` or of llama.cpp, whose
    importances weigh the squared errors. threads: None takes all cores; the bytes do not depend
    on it. Tensors that are quantized already are quantized again, with a note.

    The file appears under its name only when it is complete. An interrupted call leaves a hidden
    part beside it; the same call takes it up again and gives the same bytes.
    progress: called with "tensors", bytes done, bytes in all.
    Raises OptionError, ModelFileError (also for weights that are not finite),
    UnsupportedModelError; DeviceError if the disk is full.
    """
    from ..runtime._core import GgufFile

    path = Path(out)
    row = mixes.file_type(type)
    file = GgufFile(os.fspath(source))
    importance = None if imatrix is None else Imatrix.read(imatrix)
    for tensor in file.tensors:
        _known_type(file, tensor)
    choice = mixes.choose(
        row.name,
        file.tensors,
        model_sizes(file),
        imatrix=importance is not None,
        overrides=overrides,
    )
    tensors = [_row(t, choice.types.get(t.name, t.type)) for t in file.tensors]
    notes = list(choice.notes)
    notes += _notes(file, choice.types, importance)
    work = _Quantizing(file, choice.types, importance, threads or os.cpu_count() or 1)
    try:
        nbytes = write_model(
            path,
            _metadata(file, row, importance, imatrix),
            tensors,
            work.pieces,
            recipe=_recipe(file, importance),
            inputs=file.shards,
            force=force,
            progress=progress,
        )
    finally:
        work.close()
    types = Counter(choice.types.get(t.name, t.type) for t in file.tensors)
    return Quantized(path, nbytes, file.nbytes, dict(types.most_common()), notes)


def model_sizes(file: GgufFile) -> mixes.Sizes:
    """The sizes that the choice of types depends on, from a model's metadata."""
    architecture = file.get("general.architecture")

    def size(key: str, default: int) -> int:
        value: Any = file.get(f"{architecture}.{key}")
        if isinstance(value, list):  # one value for each layer
            value = next((v for v in value if v), None)
        return value if isinstance(value, int) else default

    heads = size("attention.head_count", 1)
    layers = [mixes.layer_of(t.name) for t in file.tensors]
    return mixes.Sizes(
        n_layer=size("block_count", max(layers, default=-1) + 1),
        n_expert=size("expert_count", 0),
        n_gqa=heads // max(1, size("attention.head_count_kv", heads)),
        architecture=str(architecture),
    )


def source_digest(file: GgufFile) -> str:
    """A digest that changes with the file: its shards' sizes and times, its directory."""
    shards = [os.stat(shard) for shard in file.shards]
    directory = [(t.name, t.type, t.shape, t.offset, t.shard) for t in file.tensors]
    return repr(([(s.st_size, s.st_mtime_ns) for s in shards], directory))


def _known_type(file: GgufFile, tensor: TensorInfo) -> None:
    try:
        format_row(tensor.type)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{file.path}: tensor {tensor.name}: {error}") from None


def _row(tensor: TensorInfo, type: str) -> Tensor:
    form = format_row(type)
    nbytes = math.prod(tensor.shape) // form["block"] * form["bytes"]
    return Tensor(tensor.name, tuple(tensor.shape), form["id"], nbytes)


def _recipe(file: GgufFile, importance: Imatrix | None) -> str:
    return json.dumps(
        [_RECIPE_VERSION, source_digest(file), None if importance is None else importance.digest]
    )


def _notes(file: GgufFile, types: Mapping[str, str], importance: Imatrix | None) -> Iterator[str]:
    floats = ("F32", "F16", "BF16")
    again = [
        t
        for t in file.tensors
        if t.type not in floats and types.get(t.name, t.type) not in (t.type, *floats)
    ]
    if again:
        yield (
            f"{len(again)} tensors were quantized already ({again[0].name} is {again[0].type}): "
            "their errors add up; a file of F16 or BF16 gives better results"
        )
    if importance is not None:
        without = [
            t.name
            for t in file.tensors
            if types.get(t.name, "F32") not in floats and importance.of(t.name, t.shape) is None
        ]
        # Embeddings are looked up, not multiplied: they have no importances.
        without = [name for name in without if name != "token_embd.weight"]
        if without:
            yield f"{len(without)} tensors have no importances ({without[0]})"


def _metadata(
    file: GgufFile,
    row: mixes.FileType,
    importance: Imatrix | None,
    imatrix: str | os.PathLike[str] | None,
) -> dict[str, bytes]:
    entries = {
        key: value
        for key, value in gguf_writer.read_metadata(file.shards[0]).items()
        if not key.startswith(("split.", "quantize.imatrix."))
    }
    entries["general.file_type"] = gguf_writer.u32(row.id)
    entries["general.quantization_version"] = gguf_writer.u32(_QUANTIZATION_VERSION)
    if importance is not None and imatrix is not None:
        entries["quantize.imatrix.file"] = gguf_writer.string(Path(imatrix).name)
        if importance.datasets:
            entries["quantize.imatrix.dataset"] = gguf_writer.string(importance.datasets[0])
        entries["quantize.imatrix.entries_count"] = gguf_writer.u32(len(importance.names))
        entries["quantize.imatrix.chunks_count"] = gguf_writer.u32(importance.chunks)
    return entries


class _Quantizing:
    """The bytes of a file's tensors in their new types."""

    def __init__(
        self,
        file: GgufFile,
        types: Mapping[str, str],
        importance: Imatrix | None,
        threads: int,
    ) -> None:
        self._file, self._types, self._importance = file, types, importance
        self._threads = threads
        self._tensors: dict[str, TensorInfo] = {t.name: t for t in file.tensors}
        self._reads: Generator[npt.NDArray[np.uint8], None, None] | None = None

    def close(self) -> None:
        """Waits for the thread that reads ahead."""
        if self._reads is not None:
            self._reads.close()

    def pieces(self, tensor: Tensor, start: int) -> Iterator[npt.NDArray[np.uint8]]:
        """The tensor's bytes from byte `start` on (the beginning of a row).

        Tensors must be asked for in the file's order: those that follow are read ahead.
        """
        info = self._tensors[tensor.name]
        if self._reads is None:
            self._reads = read_ahead(self._jobs(info, start))
        for first, n in self._cuts(info, start):
            yield self._converted(info, first, n, next(self._reads))

    def _jobs(self, begin: TensorInfo, start: int) -> Iterator[Callable[[], npt.NDArray[np.uint8]]]:
        """Reads every piece from byte `start` of a tensor on, to the end of the file."""
        tensors = list(self._tensors.values())
        for info in tensors[tensors.index(begin) :]:
            stride = self._row_bytes(info.type, info.shape[0])
            for first, n in self._cuts(info, start):
                yield partial(self._read, info, first * stride, n * stride)
            start = 0

    def _cuts(self, info: TensorInfo, start: int) -> Iterator[tuple[int, int]]:
        """(first row, rows) of each piece from byte `start` of the new tensor on.

        A piece stays within one expert if each has importances of its own.
        """
        cols, rows = info.shape[0], math.prod(info.shape[1:])
        if rows * cols == 0:
            return
        first = start // self._row_bytes(self._type_of(info), cols)
        importance = self._importance_of(info)
        group = rows if importance is None else rows // len(importance)
        while first < rows:
            n = min(piece_rows(cols), group - first % group)
            yield first, n
            first += n

    def _importance_of(self, info: TensorInfo) -> npt.NDArray[np.float32] | None:
        """The tensor's importances [1 or experts, cols], None if nothing is known."""
        if self._importance is None or info.name not in self._types:
            return None
        return self._importance.of(info.name, info.shape)

    def _type_of(self, info: TensorInfo) -> str:
        return self._types.get(info.name, info.type)

    def _converted(
        self, info: TensorInfo, first: int, n: int, data: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.uint8]:
        from ..runtime._core import requantize

        importance = self._importance_of(info)
        weights = None
        if importance is not None:
            group = math.prod(info.shape[1:]) // len(importance)
            weights = importance[first // group]
        try:
            return requantize(
                info.type,
                data,
                n,
                info.shape[0],
                self._type_of(info),
                weights,
                self._threads,
                first_row=first,
            )
        except ModelFileError as error:
            raise ModelFileError(f"{self._file.path}: tensor {info.name}: {error}") from None

    def _read(self, info: TensorInfo, at: int, nbytes: int) -> npt.NDArray[np.uint8]:
        try:
            return read_bytes(self._file.shards[info.shard], info.offset + at, nbytes)
        except OSError as error:
            raise ModelFileError(f"{self._file.path}: tensor {info.name}: {error}") from error

    @staticmethod
    def _row_bytes(type: str, cols: int) -> int:
        form = format_row(type)
        return cols // int(form["block"]) * int(form["bytes"])

"""One file with every expert matrix in several types; its header shows one of them.

Trying another bit allocation then costs the writing of a header, not of a model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...runtime.base.errors import ModelFileError
from ...runtime.base.progress import Progress
from ..writer import gguf_writer
from ..writer.gguf_writer import Tensor
from ..writer.model_writer import read_bytes, write_model
from ..writer.tensor_types import format_row
from .bit_allocation import Choice
from .expert_matrices import ExpertMatrix

if TYPE_CHECKING:
    from ...runtime._core import GgufFile

_DIGEST_KEY = "stoker.palette"
_COPY_BYTES = 32 << 20
# (matrix, type) -> the matrix's bytes in that type.
Quantizer = Callable[[ExpertMatrix, str], npt.NDArray[np.uint8]]


def matrix_bytes(matrix: ExpertMatrix, type: str) -> int:
    """Bytes of a matrix in a tensor type."""
    form = format_row(type)
    return matrix.rows * matrix.cols // int(form["block"]) * int(form["bytes"])


def single_tensor(matrix: ExpertMatrix, type: str) -> Tensor:
    """The directory's row for a matrix as a tensor of its own."""
    form = format_row(type)
    shape = (matrix.cols, matrix.rows)
    return Tensor(matrix.name, shape, form["id"], matrix_bytes(matrix, type))


def model_metadata(file: GgufFile) -> dict[str, bytes]:
    """The encoded metadata of a model, without the keys that hold only for its shards."""
    entries = gguf_writer.read_metadata(file.shards[0])
    return {key: value for key, value in entries.items() if not key.startswith("split.")}


def rest_of(file: GgufFile, matrices: Sequence[ExpertMatrix]) -> Sequence[Tensor]:
    """Every tensor that holds no expert matrix."""
    held = {m.tensor for m in matrices}
    return [
        Tensor(t.name, tuple(t.shape), format_row(t.type)["id"], t.nbytes)
        for t in file.tensors
        if t.name not in held
    ]


def copied(file: GgufFile, name: str, start: int) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of a tensor unchanged, from byte `start` on. Raises ModelFileError."""
    info = next(t for t in file.tensors if t.name == name)
    while start < info.nbytes:
        n = min(_COPY_BYTES, info.nbytes - start)
        try:
            yield read_bytes(file.shards[info.shard], info.offset + start, n)
        except OSError as error:
            raise ModelFileError(f"{file.path}: tensor {name}: {error}") from error
        start += n


class MixedPrecisionStore:
    """The file, beside the model that is to be made; close() removes it."""

    def __init__(
        self,
        path: Path,
        file: GgufFile,
        matrices: Sequence[ExpertMatrix],
        types: Sequence[Sequence[str]],
        *,
        recipe: str,
    ) -> None:
        """types: tensor types of each matrix, by level. recipe: text that decides the bytes."""
        self.path = path
        self._file, self._matrices, self._types = file, matrices, types
        self._rest = rest_of(file, matrices)
        digest = hashlib.sha256(repr((recipe, types)).encode()).hexdigest()
        self._metadata = model_metadata(file) | {_DIGEST_KEY: gguf_writer.string(digest)}
        self._names: dict[str, tuple[ExpertMatrix, str]] = {}
        tensors = list(self._rest)
        for matrix, levels in zip(matrices, types, strict=True):
            for type in levels:
                row = single_tensor(matrix, type)
                name = f"{matrix.name}@{type}"
                self._names[name] = (matrix, type)
                tensors.append(Tensor(name, row.shape, row.type, row.nbytes))
        self._tensors = tensors
        self._offsets: Mapping[str, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self._tensors)

    def make(self, quantizer: Quantizer, progress: Progress | None) -> None:
        """Writes the file, or takes up one that an interrupted call has left."""
        self._offsets = gguf_writer.layout(self._metadata, self._tensors).offsets
        if self._made():
            return

        def source(tensor: Tensor, start: int) -> Iterator[npt.NDArray[np.uint8]]:
            if tensor.name in self._names:
                yield quantizer(*self._names[tensor.name])[start:]
            else:
                yield from copied(self._file, tensor.name, start)

        write_model(
            self.path,
            self._metadata,
            self._tensors,
            source,
            recipe="store",
            inputs=self._file.shards,
            force=True,
            progress=progress,
            what="store",
        )

    def _made(self) -> bool:
        with suppress(Exception):  # whatever file lies there, it is not this store
            entries = gguf_writer.read_metadata(self.path)
            return entries[_DIGEST_KEY] == self._metadata[_DIGEST_KEY]
        return False

    def select(self, levels: Choice) -> None:
        """Shows the matrices in these levels [matrices]."""
        tensors, offsets = list(self._rest), {t.name: self._offsets[t.name] for t in self._rest}
        for matrix, types, level in zip(self._matrices, self._types, levels, strict=True):
            type = types[int(level)]
            tensors.append(single_tensor(matrix, type))
            offsets[matrix.name] = self._offsets[f"{matrix.name}@{type}"]
        header = gguf_writer.header(self._metadata, tensors, offsets)
        with open(self.path, "r+b") as file:
            file.write(header)
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)

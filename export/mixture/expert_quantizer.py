"""Quantization of single expert matrices, and the error that it makes in the expert's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...runtime.base.errors import ModelFileError
from ..writer.imatrix_file import Imatrix
from ..writer.model_writer import read_bytes
from .expert_matrices import ExpertMatrix

if TYPE_CHECKING:
    from ...runtime._core import GgufFile

Bytes = npt.NDArray[np.uint8]
_PRIOR = 0.01  # share of a mean expert's tokens added to every expert, so that unseen ones count


class ExpertQuantizer:
    """Reads expert matrices of a file and quantizes them with the importances of a text."""

    def __init__(self, file: GgufFile, imatrix: Imatrix, threads: int) -> None:
        self._file, self._threads = file, threads
        self._importance: dict[str, npt.NDArray[np.float32]] = {}
        self._tokens: Mapping[str, npt.NDArray[np.float32]] = {
            name: entry.counts for name, entry in imatrix.entries.items()
        }
        for t in file.tensors:
            found = imatrix.of(t.name, t.shape)
            if found is not None:
                self._importance[t.name] = found
        self._last: tuple[ExpertMatrix, Bytes] | None = None

    def convert(self, matrix: ExpertMatrix, type: str) -> Bytes:
        """All rows in a tensor type: uint8 [bytes]."""
        data = self._read(matrix)
        if type == matrix.type:
            return data
        return self._requantize(matrix, data, matrix.rows, type).reshape(-1)

    def errors(
        self, matrix: ExpertMatrix, types: Sequence[str], rows: int
    ) -> tuple[npt.NDArray[np.float64], float]:
        """(squared error of the outputs in each type, the outputs' own squares), over the text.

        Measured on at most `rows` of its rows, evenly spread, scaled to all. Inputs are assumed
        uncorrelated: sum over columns of mean square of the input times squared error, times the
        tokens that the expert was given.
        """
        data = self._read(matrix).reshape(matrix.rows, -1)
        step = max(1, matrix.rows // rows)
        some = np.ascontiguousarray(data[::step])
        n = len(some)
        weights = self._floats(matrix.type, some, n, matrix.cols)
        importance = self._importance_of(matrix).astype(np.float64)
        scale = self.tokens(matrix) * matrix.rows / n
        found = []
        for type in types:
            if type == matrix.type:
                found.append(0.0)
                continue
            other = self._requantize(matrix, some.reshape(-1), n, type)
            error = weights - self._floats(type, other, n, matrix.cols)
            found.append(float((np.square(error).sum(axis=0) @ importance) * scale))
        return np.array(found), float((np.square(weights).sum(axis=0) @ importance) * scale)

    def tokens(self, matrix: ExpertMatrix) -> float:
        """Tokens of the text that were routed to the expert, plus the prior."""
        counts = self._tokens.get(matrix.tensor)
        if counts is None:
            return 1.0
        own = counts[matrix.slice] if len(counts) > 1 else counts[0]
        return float(own) + _PRIOR * max(1.0, float(counts.mean()))

    def _importance_of(self, matrix: ExpertMatrix) -> npt.NDArray[np.float32]:
        found = self._importance.get(matrix.tensor)
        if found is None:
            return np.ones(matrix.cols, dtype=np.float32)
        own: npt.NDArray[np.float32] = found[matrix.slice] if len(found) > 1 else found[0]
        return own

    def _requantize(self, matrix: ExpertMatrix, data: Bytes, rows: int, type: str) -> Bytes:
        from ...runtime._core import requantize

        weights = self._importance_of(matrix)
        if not weights.any():
            weights = np.ones_like(weights)
        try:
            return requantize(matrix.type, data, rows, matrix.cols, type, weights, self._threads)
        except ModelFileError as error:
            raise ModelFileError(f"{self._file.path}: tensor {matrix.tensor}: {error}") from None

    @staticmethod
    def _floats(type: str, data: Bytes, rows: int, cols: int) -> npt.NDArray[np.float32]:
        from ...runtime._core import dequantize

        floats: npt.NDArray[np.float32] = dequantize(type, data.reshape(-1), rows * cols)
        return np.asarray(floats, dtype=np.float32).reshape(rows, cols)

    def _read(self, matrix: ExpertMatrix) -> Bytes:
        if self._last is not None and self._last[0] is matrix:
            return self._last[1]
        try:
            data = read_bytes(self._file.shards[matrix.shard], matrix.offset, matrix.nbytes)
        except OSError as error:
            raise ModelFileError(f"{self._file.path}: tensor {matrix.tensor}: {error}") from error
        self._last = matrix, data
        return data

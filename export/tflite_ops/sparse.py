"""Sparse constants of tflite, as dense ones.

A sparse tensor's values lie in the order of a walk through its dimensions, in traversal order; a
dimension may be cut into blocks, which are dimensions of the walk of their own. On each level of
the walk all indices are there (dense), or those that a list names (segments of it for each path so
far, as in compressed rows). Source: SparsityParameters of the schema; Chou et al., Format
Abstraction for Sparse Tensor Algebra Compilers, 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime.errors import ModelFileError

Array = npt.NDArray[Any]

_DENSE = 0  # the schema's DimensionType: DENSE, SPARSE_CSR
_INDICES = ("Int32Vector", "Uint16Vector", "Uint8Vector")


class SparseTensor:
    """The walk through one sparse tensor of a file."""

    def __init__(self, row: Any, schema: Any, what: str, charge: Callable[[int], None]) -> None:
        """row: the schema's table. what: names the tensor in errors. charge: takes the bytes of
        each vector that was read; it raises where they are too many.
        """
        self._row, self._schema, self._what, self._charge = row, schema, what, charge

    def dense(self, values: Array, shape: tuple[int, ...]) -> Array:
        """The tensor of `shape`: `values` [count] where the walk comes by, and zeros.

        Raises ModelFileError where indices lie outside or are not as many as the values.
        """
        row, rank = self._row, len(shape)
        order = self._ints(row.TraversalOrderAsNumpy())
        blocks = self._ints(row.BlockMapAsNumpy())
        levels = row.DimMetadataLength()
        if (
            sorted(order) != list(range(levels))
            or levels != rank + len(blocks)
            or any(not 0 <= b < rank for b in blocks)
            or len(set(blocks)) != len(blocks)
        ):
            raise ModelFileError(
                f"{self._what}: expected a walk through {rank} dimensions and {len(blocks)} of"
                f" blocks, found {order[:16]} on {levels} levels"
            )
        # The dimension of the walk that each block is, and how many elements a block has.
        block_sizes = dict.fromkeys(range(rank), 1)
        sizes: dict[int, int] = {}
        for level, dimension in enumerate(order):
            if dimension >= rank:
                sizes[dimension] = int(row.DimMetadata(level).DenseSize())
                block_sizes[blocks[dimension - rank]] = sizes[dimension]
        for dimension, n in enumerate(shape):
            size = block_sizes[dimension]
            if size < 1 or n % size:
                raise ModelFileError(
                    f"{self._what}: expected blocks that divide {list(shape)}, found {size} in"
                    f" dimension {dimension}"
                )
            sizes[dimension] = n // size
        paths = np.zeros((0, 1), np.int64)  # [levels so far, paths]: the index on each level
        for level, dimension in enumerate(order):
            paths = self._deeper(level, paths, sizes[dimension], math.prod(shape))
        if paths.shape[1] != len(values):
            raise ModelFileError(
                f"{self._what}: expected {paths.shape[1]} values of a sparse tensor, found"
                f" {len(values)}"
            )
        index = [np.zeros(len(values), np.int64) for _ in shape]
        for level, dimension in enumerate(order):
            if dimension < rank:
                index[dimension] += paths[level] * block_sizes[dimension]
            else:
                index[blocks[dimension - rank]] += paths[level]
        made = np.zeros(shape, values.dtype)
        made[tuple(index)] = values
        return made

    def _deeper(self, number: int, paths: Array, size: int, most: int) -> Array:
        """The paths [levels + 1, up to `most`] one level down, of indices below `size`."""
        level, count = self._row.DimMetadata(number), paths.shape[1]
        if level.Format() == _DENSE:
            if level.DenseSize() != size or count * size > most:
                raise ModelFileError(
                    f"{self._what}: expected {size} indices on a dense level and {most} values,"
                    f" found {level.DenseSize()} for each of {count}"
                )
            last = np.tile(np.arange(size), count)
            return np.vstack([np.repeat(paths, size, axis=1), last])
        segments = self._vector(level.ArraySegments(), level.ArraySegmentsType())
        indices = self._vector(level.ArrayIndices(), level.ArrayIndicesType())
        lengths = np.diff(segments)
        fits = len(segments) == count + 1 and segments[0] == 0
        fits = fits and segments[-1] == len(indices) <= most
        if not fits or (lengths < 0).any() or (indices < 0).any() or (indices >= size).any():
            raise ModelFileError(
                f"{self._what}: expected {count + 1} ascending segments of indices below {size},"
                f" found {len(segments)} of {len(indices)}"
            )
        return np.vstack([np.repeat(paths, lengths, axis=1), indices])

    def _vector(self, table: Any, kind: int) -> npt.NDArray[np.int64]:
        for name in _INDICES:
            if table is not None and kind == getattr(self._schema.SparseIndexVector, name):
                vector = getattr(self._schema, name)()
                vector.Init(table.Bytes, table.Pos)
                return np.array(self._ints(vector.ValuesAsNumpy()), np.int64)
        raise ModelFileError(f"{self._what}: expected indices of a sparse level, found none")

    def _ints(self, found: Any) -> list[int]:
        if isinstance(found, int):  # the schema's reader returns 0 where the file has none
            return []
        self._charge(found.nbytes)
        return [int(n) for n in found]

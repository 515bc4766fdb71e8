"""Conversion of tflite's sparse constants to dense ones.

A sparse tensor's values are stored in the order of a traversal of its dimensions, the traversal
order; a dimension may be cut into blocks, which are dimensions of the traversal of their own. A
level of the traversal has all indices (dense), or those that a list names (segments of it for each
path so far, as in compressed rows). Source: SparsityParameters of the schema; Chou et al., Format
Abstraction for Sparse Tensor Algebra Compilers, 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...runtime.base.errors import ModelFileError

Array = npt.NDArray[Any]

_DENSE = 0  # the schema's DimensionType: DENSE, SPARSE_CSR
_PART = 1 << 18  # paths that are handled at once
_INDICES = ("Int32Vector", "Uint16Vector", "Uint8Vector")


class _Level(NamedTuple):
    """A level of the traversal: all indices below size, or those listed for each path."""

    size: int
    # [paths before it]: how many indices extend each; [paths after it]: these indices, as stored
    listed: tuple[Array, Array] | None


class SparseTensor:
    """The traversal of one sparse tensor of a file."""

    def __init__(self, row: Any, schema: Any, what: str, charge: Callable[[int], None]) -> None:
        """row: the schema's table. what: the tensor's name in errors. charge: takes the bytes of
        each vector that was read; it raises if they are too many.
        """
        self._row, self._schema, self._what, self._charge = row, schema, what, charge

    def dense(self, values: Array, shape: tuple[int, ...]) -> Array:
        """The tensor of `shape`, of less than 2 GiB: `values` [count] at the traversal's positions,
        and zeros elsewhere.

        The traversal takes four bytes a path, twice, and there are never more paths than values or
        segments in the file, whatever sizes it names.
        Raises ModelFileError if indices lie outside or are not as many as the values.
        """
        order, sizes, strides = self._dimensions(shape)
        levels = self._levels([sizes[d] for d in order], len(values))
        at = np.zeros(1, np.int32)  # [paths]: each path's position in the flat tensor so far
        for level, dimension in zip(levels, order, strict=True):
            stride = np.int32(strides[dimension])
            if level.listed is None:
                steps = np.arange(level.size, dtype=np.int32) * stride
                at = (at[:, None] + steps).reshape(-1)
            else:
                lengths, indices = level.listed
                at = np.repeat(at, lengths)
                for part in _parts(len(at)):
                    at[part] += indices[part].astype(np.int32) * stride
        made = np.zeros(shape, values.dtype)
        flat = made.reshape(-1)
        for part in _parts(len(values)):
            flat[at[part]] = values[part]
        return made

    def _dimensions(self, shape: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
        """The dimension of each level, and by dimension its number of indices in the traversal and
        their distance in the flat tensor; dimensions from the shape's rank on are blocks.
        """
        row, rank = self._row, len(shape)
        found = self._ints(row.TraversalOrderAsNumpy()), self._ints(row.BlockMapAsNumpy())
        # Counts are checked before they become a list: the file may claim any number.
        order, blocks = (v[: 2 * rank + 1].tolist() for v in found)
        levels = row.DimMetadataLength()
        if (
            sorted(order) != list(range(levels))
            or levels != rank + len(found[1])
            or any(not 0 <= b < rank for b in blocks)
            or len(set(blocks)) != len(blocks)
        ):
            raise ModelFileError(
                f"{self._what}: expected a walk through {rank} dimensions and {len(found[1])} of"
                f" blocks, found {order} on {levels} levels"
            )
        sizes = list(shape)
        strides = [math.prod(shape[d + 1 :]) for d in range(rank)]
        for i, dimension in enumerate(blocks):
            size, n = int(row.DimMetadata(order.index(rank + i)).DenseSize()), shape[dimension]
            if size < 1 or n % size:
                raise ModelFileError(
                    f"{self._what}: expected blocks that divide {list(shape)}, found {size} in"
                    f" dimension {dimension}"
                )
            sizes.append(size)
            strides.append(strides[dimension])
            sizes[dimension] = n // size
            strides[dimension] *= size
        return order, sizes, strides

    def _levels(self, sizes: list[int], most: int) -> list[_Level]:
        """The levels of a traversal to `most` values, checked before a path is made."""
        levels, count = [], 1  # paths so far
        for number, size in enumerate(sizes):
            row = self._row.DimMetadata(number)
            if row.Format() == _DENSE:
                if row.DenseSize() != size:
                    raise ModelFileError(
                        f"{self._what}: expected {size} indices on a dense level, found"
                        f" {row.DenseSize()}"
                    )
                levels.append(_Level(size, None))
                count *= size
                continue
            segments = self._vector(row.ArraySegments(), row.ArraySegmentsType())
            indices = self._vector(row.ArrayIndices(), row.ArrayIndicesType())
            fits = len(segments) == count + 1 and segments[0] == 0 and segments[-1] == len(indices)
            fits = fits and bool((segments[1:] >= segments[:-1]).all())
            if not fits or (len(indices) and not 0 <= indices.min() <= indices.max() < size):
                raise ModelFileError(
                    f"{self._what}: expected {count + 1} ascending segments of indices below"
                    f" {size}, found {len(segments)} of {len(indices)}"
                )
            lengths: Array = np.diff(segments.astype(np.int32, copy=False))
            levels.append(_Level(size, (lengths, indices)))
            count = len(indices)
        if count != most:
            raise ModelFileError(
                f"{self._what}: expected {count} values of a sparse tensor, found {most}"
            )
        return levels

    def _vector(self, table: Any, kind: int) -> Array:
        for name in _INDICES:
            if table is not None and kind == getattr(self._schema.SparseIndexVector, name):
                vector = getattr(self._schema, name)()
                vector.Init(table.Bytes, table.Pos)
                return self._ints(vector.ValuesAsNumpy())
        raise ModelFileError(f"{self._what}: expected indices of a sparse level, found none")

    def _ints(self, found: Any) -> Array:
        """A vector as stored; the schema's reader returns 0 if the file has none."""
        if isinstance(found, int):
            return np.zeros(0, np.int32)
        self._charge(found.nbytes)
        return np.asarray(found)


def _parts(count: int) -> Iterator[slice]:
    """Slices of `count`, since numpy indexes with copies of eight bytes an element."""
    for begin in range(0, count, _PART):
        yield slice(begin, begin + _PART)

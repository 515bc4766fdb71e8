"""The mapping from a folder's tensors to the file's, and their bytes, piece by piece."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from ...runtime.base.errors import ModelFileError, UnsupportedModelError
from ..writer.gguf_writer import Tensor
from ..writer.model_writer import piece_rows, read_ahead
from ..writer.tensor_types import format_row
from .folder.safetensors_folder import SafetensorsFolder, ShardTensor
from .names.table import Change, Family, Layers, Model, Row

Bytes = npt.NDArray[np.uint8]

_FLOATS = ("F32", "F16", "BF16")
# Tensors that a folder may hold beside the weights of the language model.
_IGNORED = re.compile(
    r".*\.rotary_emb\.inv_freq|.*\.(masked_)?bias_mask|"
    r"(model\.)?(vision_tower|multi_modal_projector)\..*"
)
_PREFIXES = (
    (re.compile(r"^language_model\.(model\.|lm_head\.)"), r"\1"),
    (re.compile(r"^model\.language_model\."), "model."),
)


@dataclass(frozen=True)
class Weight:
    """A tensor of the file. shape[0] is the contiguous dimension, as in GGUF.

    parts: tensors that follow each other in its rows (more than one for experts); empty if
    `values` are computed. type: used unless another is chosen.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    parts: tuple[ShardTensor, ...] = ()
    change: Change = Change.COPY
    values: npt.NDArray[np.float32] | None = None

    @property
    def rows(self) -> int:
        """Rows of all parts together."""
        return math.prod(self.shape[1:])


def plan(folder: SafetensorsFolder, family: Family, model: Model) -> list[Weight]:
    """The file's tensors, in its order: ends first, then layer by layer.

    Raises ModelFileError if one is missing, has another shape, or is not of this family;
    UnsupportedModelError for types that are not floating point.
    """
    sources: dict[str, ShardTensor] = {}
    for name, tensor in folder.tensors.items():
        plain = name
        for pattern, replacement in _PREFIXES:
            plain = pattern.sub(replacement, plain)
        sources[plain] = tensor
    used: set[str] = set()
    weights: list[Weight] = []

    def add(row: Row, il: int | None) -> None:
        names = _sources(row, il, model.sizes)
        found = [sources[name] for name in names if name in sources]
        used.update(names)
        target = row.target.format(i=il)
        if row.source == "lm_head.weight":
            if model.tied and model.needs_output:
                found = [sources["model.embed_tokens.weight"]]
            elif model.tied:
                return
            elif not found:
                raise _missing(folder, names[0])
        elif not found and row.optional:
            return
        elif len(found) < len(names):
            raise _missing(folder, next(name for name in names if name not in sources))
        weights.append(_weight(row, target, tuple(found), model.sizes))

    for row in family.rows:
        if "{i}" not in row.source:
            add(row, None)
    for name, values in model.tensors.items():
        weights.append(Weight(name, values.shape[::-1], "F32", values=values))
    for il in range(model.n_layer):
        for row in family.rows:
            wanted = Layers.MIXTURE if model.mixture[il] else Layers.DENSE
            if "{i}" in row.source and row.layers in (Layers.ALL, wanted):
                add(row, il)
    foreseeing = tuple(
        f"model.layers.{il}." for il in range(model.n_layer, model.n_layer + model.foresees)
    )
    rest = [
        name
        for name in sources
        if name not in used and not _IGNORED.fullmatch(name) and not name.startswith(foreseeing)
    ]
    if rest:
        tensor = sources[rest[0]]
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise UnsupportedModelError(
            f"{tensor.shard}: tensor {tensor.name}{more}: expected none of this name in "
            f"{family.classes[0]}, found {list(tensor.shape)}"
        )
    return weights


def _sources(row: Row, il: int | None, sizes: Mapping[str, int]) -> list[str]:
    if "{e}" not in row.source:
        return [row.source.format(i=il)]
    return [row.source.format(i=il, e=e) for e in range(sizes["n_expert"])]


def _missing(folder: SafetensorsFolder, name: str) -> ModelFileError:
    return ModelFileError(f"{folder.folder}: expected tensor {name}, found none")


def _weight(
    row: Row, target: str, parts: tuple[ShardTensor, ...], sizes: Mapping[str, int]
) -> Weight:
    shape = tuple(sizes[name] for name in row.shape)
    each = shape[1:] if "{e}" in row.source else shape
    for part in parts:
        if part.shape != each:
            raise ModelFileError(
                f"{part.shard}: tensor {part.name}: expected shape {list(each)}, "
                f"found {list(part.shape)}"
            )
        if part.dtype not in _FLOATS:
            raise UnsupportedModelError(
                f"{part.shard}: tensor {part.name}: expected one of {', '.join(_FLOATS)}, "
                f"found {part.dtype}"
            )
        if part.dtype != parts[0].dtype:
            raise UnsupportedModelError(
                f"{part.shard}: tensor {part.name}: expected {parts[0].dtype} as "
                f"{parts[0].name} has, found {part.dtype}"
            )
    small = len(shape) == 1 or ".ffn_gate_inp" in target
    if row.shape[0] == "one":  # a matrix of one row is stored as a vector
        shape = shape[1:]
    type = "F32" if small else parts[0].dtype
    return Weight(target, shape[::-1], type, parts, row.change)


class HfWeights:
    """The bytes of a plan's tensors, each in its chosen type."""

    def __init__(
        self,
        folder: SafetensorsFolder,
        weights: list[Weight],
        types: Mapping[str, str],
        head_dim: int,
        threads: int,
    ) -> None:
        """types: by tensor name, for types that differ from Weight.type. head_dim: for PAIRS."""
        self._folder = folder
        self._weights = {weight.name: weight for weight in weights}
        self._types = types
        self._head_dim = head_dim
        self._threads = threads

    def directory(self) -> list[Tensor]:
        """The rows of the file's directory."""
        rows = []
        for weight in self._weights.values():
            form = format_row(self.type_of(weight))
            nbytes = math.prod(weight.shape) // form["block"] * form["bytes"]
            rows.append(Tensor(weight.name, weight.shape, form["id"], nbytes))
        return rows

    def type_of(self, weight: Weight) -> str:
        """The type that a tensor has in the file."""
        return self._types.get(weight.name, weight.type)

    def pieces(self, tensor: Tensor, start: int) -> Iterator[Bytes | memoryview]:
        """The tensor's bytes from byte `start` on (the beginning of a row)."""
        weight = self._weights[tensor.name]
        if weight.values is not None:
            yield np.ascontiguousarray(weight.values).data.cast("B")[start:]
            return
        form = format_row(self.type_of(weight))
        cols = weight.shape[0]
        first = start // (cols // form["block"] * form["bytes"])
        jobs = (partial(self._read, weight, at, n) for at, n in self._cuts(weight, first))
        for at, n, data in read_ahead(jobs):
            yield self._converted(weight, at, n, data)

    def _cuts(self, weight: Weight, first: int) -> Iterator[tuple[int, int]]:
        step = piece_rows(weight.shape[0])
        if weight.change is Change.PAIRS and len(weight.shape) > 1:
            step = max(1, step // self._head_dim) * self._head_dim  # whole heads
        rows = weight.rows
        while first < rows:
            # The grid of pieces is the same wherever an earlier call left off.
            n = min(step - first % step, rows - first)
            yield first, n
            first += n

    def _segments(
        self, weight: Weight, first: int, n: int
    ) -> Iterator[tuple[ShardTensor, int, int]]:
        """(tensor, first row, rows) of the parts that rows [first, first + n) come from."""
        each = weight.rows // len(weight.parts)
        while n:
            part, at = divmod(first, each)
            take = min(n, each - at)
            yield weight.parts[part], at, take
            first, n = first + take, n - take

    def _read(self, weight: Weight, first: int, n: int) -> tuple[int, int, Bytes]:
        pieces = [
            self._folder.read(tensor, at, take)
            if len(weight.shape) > 1
            else self._folder.read(tensor, 0, tensor.rows)
            for tensor, at, take in self._segments(weight, first, n)
        ]
        return first, n, pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _converted(self, weight: Weight, first: int, n: int, data: Bytes) -> Bytes:
        from ...runtime._core import requantize

        cols, source, type = weight.shape[0], weight.parts[0].dtype, self.type_of(weight)
        if weight.change is Change.PAIRS:
            data = self._pairs(data, cols if len(weight.shape) == 1 else n)
        try:
            if weight.change is Change.PLUS_ONE:
                values = requantize(source, data, n, cols, "F32").view(np.float32) + np.float32(1)
                data, source = values.view(np.uint8).reshape(-1), "F32"
            return requantize(
                source, data, n, cols, type, None, self._threads, first_row=first
            ).reshape(-1)
        except ModelFileError as error:
            raise self._blamed(weight, first, n, error) from None

    def _pairs(self, data: Bytes, rows: int) -> Bytes:
        """Rows of whole heads, each from (i, i + head_dim / 2) to (2i, 2i + 1)."""
        heads = data.reshape(rows // self._head_dim, 2, self._head_dim // 2, -1)
        return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(-1)

    def _blamed(self, weight: Weight, first: int, n: int, error: ModelFileError) -> ModelFileError:
        """The error with the tensor of the folder that it came from."""
        from ...runtime._core import requantize

        for tensor, at, take in self._segments(weight, first, n):
            data = self._folder.read(tensor, at, take)
            try:
                requantize(tensor.dtype, data, take, weight.shape[0], tensor.dtype, first_row=at)
            except ModelFileError as found:
                return ModelFileError(f"{tensor.shard}: tensor {tensor.name}: {found}")
        tensor = next(self._segments(weight, first, n))[0]
        return ModelFileError(f"{tensor.shard}: tensor {tensor.name}: {error}")

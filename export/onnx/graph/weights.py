"""The matrices of a GGUF file as operators of a graph, at the width that was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ....runtime.base.errors import DeviceError, ModelFileError, UnsupportedModelError
from . import blocks
from .blocks import BLOCK, Blocks
from .graph import MICROSOFT, Graph

if TYPE_CHECKING:
    from ....runtime._core import GgufFile, TensorInfo

Width = Literal["keep", "int4", "int8", "f16", "f32"]
Array = npt.NDArray[np.float32]

_PIECE = 1 << 22  # weights that are converted at a time
_INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level for int8 activations


@dataclass(frozen=True)
class _Slice:
    """One expert's matrix of a stack; its fields are those of TensorInfo."""

    name: str
    type: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int


class Weights:
    """Tensors of one file, read piece by piece. `unused` names those that were never asked for."""

    def __init__(self, file: GgufFile, width: Width) -> None:
        from ....runtime._core import formats

        self.path = file.path
        self.width = width
        self._shards = file.shards
        self._tensors = {t.name: t for t in file.tensors}
        self._formats = {row["name"]: row for row in formats()}
        self._asked: set[str] = set()
        self._slices: dict[str, _Slice] = {}  # single experts' matrices of a stack
        self.token_bytes = 0.0  # bytes of the matrices that each token reads

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._slices

    @property
    def unused(self) -> list[str]:
        """Names of the tensors that nothing has read."""
        return [name for name in self._tensors if name not in self._asked]

    def experts(self, prefix: str, part: str, n: int) -> list[str]:
        """Names of the n experts' matrices, `prefix`ffn_`part`.E.weight.

        A file may hold them under these names, or as one stack, which is cut without reading it.
        """
        names = [f"{prefix}ffn_{part}.{e}.weight" for e in range(n)]
        stack = f"{prefix}ffn_{part}_exps.weight"
        if stack not in self._tensors:
            return names
        whole = self.info(stack)
        if len(whole.shape) != 3 or whole.shape[2] != n:
            found = " x ".join(map(str, self.shape(stack)))
            raise ModelFileError(f"{self.path}: {stack}: expected {n} matrices, found {found}")
        nbytes = whole.nbytes // n
        for e, name in enumerate(names):
            self._slices[name] = _Slice(
                name,
                whole.type,
                tuple(whole.shape[:2]),
                whole.shard,
                whole.offset + e * nbytes,
                nbytes,
            )
        return names

    def info(self, name: str) -> TensorInfo | _Slice:
        """The directory's row. Raises ModelFileError, UnsupportedModelError."""
        if name in self._slices:
            return self._slices[name]
        if name not in self._tensors:
            raise ModelFileError(f"{self.path}: expected a tensor {name}, found none")
        self._asked.add(name)
        tensor = self._tensors[name]
        if tensor.type not in self._formats:
            raise UnsupportedModelError(
                f"{self.path}: {name}: expected one of {', '.join(self._formats)}, "
                f"found {tensor.type}"
            )
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in numpy order: rows first, the contiguous dimension last."""
        return tuple(int(n) for n in reversed(self.info(name).shape))

    def vector(self, name: str, n: int) -> Array:
        """A whole small tensor as float32 [n]. Raises ModelFileError if it has another size."""
        tensor = self.info(name)
        if int(np.prod(tensor.shape)) != n:
            found = " x ".join(map(str, self.shape(name)))
            raise ModelFileError(f"{self.path}: {name}: expected {n} values, found {found}")
        values = self._values(tensor, self._bytes(tensor, 0, tensor.nbytes), n)
        if not np.isfinite(values).all():
            raise ModelFileError(f"{self.path}: {name}: expected finite values, found NaN or inf")
        return values

    def optional(self, name: str, n: int) -> Array | None:
        """Like vector, None if the file has no such tensor."""
        return self.vector(name, n) if name in self else None

    def _bytes(self, tensor: TensorInfo | _Slice, begin: int, n: int) -> npt.NDArray[np.uint8]:
        shard = self._shards[tensor.shard]
        try:
            with open(shard, "rb") as file:
                file.seek(tensor.offset + begin)
                data = file.read(n)
        except OSError as error:
            raise DeviceError(f"{shard}: reading {tensor.name}: {error.strerror}") from error
        if len(data) != n:
            raise ModelFileError(
                f"{shard}: {tensor.name}: expected {n} bytes at {tensor.offset + begin}, "
                f"found {len(data)}"
            )
        return np.frombuffer(data, np.uint8)

    def _values(self, tensor: TensorInfo | _Slice, data: npt.NDArray[np.uint8], n: int) -> Array:
        from ....runtime._core import dequantize

        return dequantize(tensor.type, data, n)

    def pieces(self, name: str) -> Iterator[tuple[int, npt.NDArray[np.uint8], int]]:
        """(first row, bytes, rows) of a matrix, a few million weights at a time."""
        tensor = self.info(name)
        cols, rows = int(tensor.shape[0]), int(tensor.shape[1])
        row_bytes = tensor.nbytes // rows
        step = max(1, _PIECE // cols)
        for row in range(0, rows, step):
            n = min(step, rows - row)
            yield row, self._bytes(tensor, row * row_bytes, n * row_bytes), n

    def floats(self, name: str) -> Iterator[Array]:
        """The matrix in pieces, float32 [rows, cols]. Raises ModelFileError for NaN."""
        tensor = self.info(name)
        cols = int(tensor.shape[0])
        for _, data, rows in self.pieces(name):
            values = self._values(tensor, data, rows * cols)
            if not np.isfinite(values).all():
                raise ModelFileError(
                    f"{self.path}: {name}: expected finite weights, found NaN or inf"
                )
            yield values.reshape(rows, cols)

    def blocks(self, name: str, bits: int) -> Iterator[Blocks]:
        """The matrix in pieces of quantized blocks; its rows are whole blocks."""
        from ....runtime._core import quantize

        tensor = self.info(name)
        cols = int(tensor.shape[0])
        exact = {4: blocks.EXACT, 8: frozenset({"Q8_0"})}[bits]
        if tensor.type in exact:
            for _, data, rows in self.pieces(name):
                if bits == 8:
                    made = blocks.eight_bits(data, rows, cols)
                else:
                    made = blocks.four_bits(tensor.type, data, None, rows, cols)
                if not np.isfinite(made.scales).all():
                    raise ModelFileError(
                        f"{self.path}: {name}: expected finite weights, found NaN or inf"
                    )
                yield made
            return
        for values in self.floats(name):
            if bits == 8:
                data = quantize("Q8_0", np.ascontiguousarray(values.reshape(-1)))
                yield blocks.eight_bits(data, len(values), cols)
            else:
                yield blocks.four_bits(tensor.type, np.empty(0, np.uint8), values, *values.shape)


@dataclass(frozen=True)
class Matrix:
    """One or more matrices of the same input, their rows one after another.

    bits: 32 and 16 for floats, 8 and 4 for blocks; affine: the blocks have offsets.
    """

    names: tuple[str, ...]
    rows: int
    cols: int
    bits: int
    affine: bool


def describe(weights: Weights, *names: str, head: bool = False, exact: bool = False) -> Matrix:
    """Chooses how these matrices are stored. head: they are the embedding, or the output's.

    exact: float32, whatever the width that was asked for.

    Rows that are not whole blocks stay float32. The embedding gets 8 bits if 4 would lose: the
    tokens' probabilities come from it directly.
    """
    shapes = [weights.shape(name) for name in names]
    cols = shapes[0][-1]
    for name, shape in zip(names, shapes, strict=True):
        if len(shape) != 2 or shape[-1] != cols:
            raise ModelFileError(
                f"{weights.path}: {name}: expected rows of {cols} values, found "
                f"{' x '.join(map(str, shape))}"
            )
    types = {weights.info(name).type for name in names}
    keeps = 4 if types <= blocks.EXACT else 8
    bits = {"f32": 32, "f16": 16, "int8": 8, "int4": 4, "keep": keeps}[weights.width]
    if exact or (bits < 16 and cols % BLOCK):
        bits = 32
    affine = bits == 4 and not types <= blocks.SYMMETRIC
    if head and affine and not types <= blocks.EXACT:
        bits, affine = 8, False
    return Matrix(names, sum(shape[0] for shape in shapes), cols, bits, affine)


def _store(graph: Graph, w: Weights, m: Matrix, *, flat: bool = False) -> list[str]:
    """Initializers of a matrix: values, or packed blocks, scales and perhaps offsets.

    flat: packed as [rows, bytes] instead of [rows, blocks, bytes].
    """
    key = "+".join(m.names)
    name = m.names[0] if len(m.names) == 1 else key
    if m.bits >= 16:
        dtype = np.dtype(np.float32 if m.bits == 32 else np.float16)

        def values() -> Iterator[tuple[int, npt.NDArray[Any]]]:
            for part in m.names:
                for piece in w.floats(part):
                    if m.bits == 16 and np.abs(piece).max() > 65504:
                        raise ModelFileError(
                            f"{w.path}: {part}: expected values that f16 holds (up to 65504), "
                            f"found {np.abs(piece).max():g}: use --type f32"
                        )
                    yield 0, piece.astype(dtype)

        return graph.stored([(name, dtype, (m.rows, m.cols), key)], values)
    n, size = m.cols // BLOCK, BLOCK * m.bits // 8
    shape = (m.rows, n * size) if flat else (m.rows, n, size)
    suffix = "_flat" if flat else ""
    arrays: list[tuple[str, npt.DTypeLike, tuple[int, ...], str]] = [
        (f"{name}_q{m.bits}{suffix}", np.uint8, shape, key + "_q"),
        (f"{name}_scales", np.float32, (m.rows, n), key + "_scales"),
    ]
    if m.affine:
        arrays.append((f"{name}_offsets", np.float32, (m.rows, n), key + "_offsets"))

    def packed() -> Iterator[tuple[int, npt.NDArray[Any]]]:
        for part in m.names:
            for piece in w.blocks(part, m.bits):
                yield 0, piece.packed
                yield 1, piece.scales
                if m.affine:
                    offsets = piece.offsets
                    yield 2, np.zeros_like(piece.scales) if offsets is None else offsets

    return graph.stored(arrays, packed)


def stored_bytes(m: Matrix) -> int:
    """Bytes of a matrix in the data file."""
    if m.bits >= 16:
        return m.rows * m.cols * m.bits // 8
    per_block = BLOCK * m.bits // 8 + 4 + (4 if m.affine else 0)
    return m.rows * (m.cols // BLOCK) * per_block


class Linear:
    """Products with a file's matrices in a graph. The means of an input's blocks are made once."""

    def __init__(self, graph: Graph, weights: Weights) -> None:
        self._graph, self._weights = graph, weights
        self._means: dict[str, str] = {}  # input -> the means of its blocks
        # input -> the tensor that it is a piece of, all pieces, and their lengths
        self._split: dict[str, tuple[str, list[str], str]] = {}

    def __call__(
        self,
        x: str,
        names: tuple[str, ...],
        output: str,
        *,
        head: bool = False,
        exact: bool = False,
        share: float = 1.0,
    ) -> tuple[str, Matrix]:
        """x [..., cols] -> output [..., rows of all], plus the biases that the file has.

        head, exact: as for describe. share: share of the tokens that the matrix is multiplied with.
        """
        g, w = self._graph, self._weights
        m = describe(w, *names, head=head, exact=exact)
        w.token_bytes += share * stored_bytes(m)
        bias = self._bias(names)
        target = output if bias is None else output + "_unbiased"
        stored = _store(g, w, m)
        if m.bits >= 16:
            matrix = stored[0]
            if m.bits == 16:
                matrix = g.node("Cast", [matrix], output + "_weight", to=1)
            g.node("FusedMatMul", [x, matrix], target, domain=MICROSOFT, transB=1)
        else:
            blocks_at = target + "_blocks" if m.affine else target
            g.node(
                "MatMulNBits",
                [x, *stored[:2]],
                blocks_at,
                domain=MICROSOFT,
                K=m.cols,
                N=m.rows,
                bits=m.bits,
                block_size=BLOCK,
                accuracy_level=_INT8_ACTIVATIONS,
            )
            if m.affine:
                means = self._block_means(x)
                offset = g.node(
                    "FusedMatMul",
                    [means, stored[2]],
                    target + "_offset",
                    domain=MICROSOFT,
                    transB=1,
                    alpha=float(BLOCK),
                )
                g.node("Add", [blocks_at, offset], target)
        if bias is not None:
            g.node("Add", [target, bias], output)
        return output, m

    def alike(self, names: tuple[str, ...]) -> bool:
        """Whether one product for all of them stores each as narrowly as its own would."""
        return len({describe(self._weights, name).bits for name in names}) == 1

    def _bias(self, names: tuple[str, ...]) -> str | None:
        w = self._weights
        biases = [name.removesuffix(".weight") + ".bias" for name in names]
        if not any(bias in w for bias in biases):
            return None
        parts = []
        for name, bias in zip(names, biases, strict=True):
            rows = w.shape(name)[0]
            found = w.optional(bias, rows)
            parts.append(np.zeros(rows, np.float32) if found is None else found)
        return self._graph.constant("+".join(biases), np.concatenate(parts))

    def share_means(self, x: str, pieces: list[str], lengths: str) -> None:
        """Notes that x [1, tokens, cols] was split into `pieces`, so that its means are split, too.

        lengths: int64 [pieces], tokens of each. Nothing is added before means are asked for.
        """
        for piece in pieces:
            self._split[piece] = x, pieces, lengths

    def _block_means(self, x: str) -> str:
        """x [batch, sequence, cols] -> [batch, sequence, cols / 32]."""
        if x in self._split and x not in self._means:
            whole, pieces, lengths = self._split[x]
            outputs = [f"{piece}_means" for piece in pieces]
            self._graph.nodes("Split", [self._block_means(whole), lengths], outputs, axis=1)
            self._means.update(zip(pieces, outputs, strict=True))
        if x not in self._means:
            self._means[x] = self._graph.node(
                "AveragePool", [x], x + "_means", kernel_shape=[BLOCK], strides=[BLOCK]
            )
        return self._means[x]

    def embedding(self, ids: str, name: str, output: str) -> str:
        """Looks up rows of a matrix: ids [...] -> [..., cols]."""
        g, w = self._graph, self._weights
        m = describe(w, name, head=True)
        if m.bits >= 16:
            (matrix,) = _store(g, w, m)
            if m.bits == 32:
                return g.node("Gather", [matrix, ids], output)
            return g.node("Cast", [g.node("Gather", [matrix, ids], output + "_f16")], output, to=1)
        matrix, scales, *offsets = _store(g, w, m, flat=True)
        target = output + "_blocks" if offsets else output
        g.node(
            "GatherBlockQuantized",
            [matrix, ids, scales],
            target,
            domain=MICROSOFT,
            bits=m.bits,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )
        if offsets:  # one offset for the 32 values of a block
            cut = g.constant(
                "blocks_of_embedding", np.array([0, 0, m.cols // BLOCK, BLOCK], np.int64)
            )
            values = g.node("Reshape", [target, cut], output + "_in_blocks")
            found = g.node("Gather", [offsets[0], ids], output + "_offsets")
            axis = g.constant("last_axis", np.array([-1], np.int64))
            wide = g.node("Unsqueeze", [found, axis], output + "_offset_of_blocks")
            total = g.node("Add", [values, wide], output + "_sum_of_blocks")
            g.node("Reshape", [total, g.constant("joined", np.array([0, 0, -1], np.int64))], output)
        return output

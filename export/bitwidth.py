"""Bit allocation for experts: few bits if an error costs little, many if it costs much.

The idea is EdgeMoE's (a bitwidth for each expert), the search EvoPress's (evolution on the measured
divergence). In three steps:

1. The quick proxy: the squared error of a matrix in each type, weighted by the matrix's input
   activations on a text (an importance matrix), relative to what its layer computes.
2. What a layer's error really costs: the divergence from the source model with that layer's experts
   in the smallest types, and the same for all gates, ups and downs.
3. Evolution: the weights of the layers are changed at random, the types allotted anew for the same
   size, and the change is kept if the divergence fell.

The divergence is measured on a mixed-precision store (mixed_precision_store.py) by the engine
itself, offloaded, so that the model may be larger than memory; what is reported comes from text
that the search never saw.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..runtime._core import GgufFile
from ..runtime.base.checked_call import checked
from ..runtime.base.errors import Cancelled, OptionError, StokerError
from ..runtime.base.progress import Progress
from ..runtime.files.output_file import check_output
from . import imatrix as importances
from .mixture.bit_allocation import BitAllocation, Choice
from .mixture.expert_matrices import PARTS, ExpertMatrix, expert_matrices, joined_name
from .mixture.expert_quantizer import ExpertQuantizer
from .mixture.judge import Judge, Measurement, cut_text
from .mixture.mixed_precision_store import (
    MixedPrecisionStore,
    copied,
    matrix_bytes,
    model_metadata,
    rest_of,
    single_tensor,
)
from .quantize import source_digest
from .writer import gguf_writer, mixes
from .writer.gguf_writer import Tensor
from .writer.imatrix_file import Imatrix
from .writer.model_writer import write_model
from .writer.tensor_types import format_row

DEFAULT_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")

_RECIPE_VERSION = 1
_SAMPLED_ROWS = 64  # rows of a matrix that the quick proxy quantizes
_STEP = 0.7  # standard deviation of one evolution step, in the logarithm of a layer's weight
_CHANGED = 0.3  # share of the weights that one step of the evolution changes
_BISECTIONS = 7

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One allocation. uniform: the type that all experts have as far as their rows allow, "" if
    they differ. nbytes: size of the model; bits: mean bits of an expert's weight.

    kl: mean divergence from the source, nats; ppl: perplexity; both on text that the search never
    saw.
    """

    uniform: str
    nbytes: int
    bits: float
    kl: float
    ppl: float


@dataclass(frozen=True)
class Adapted:
    """What `adapt` found. points: by size. made: the point that was written to `path`.

    types: number of expert matrices in that file by (part, type).
    """

    path: Path | None
    source: Point
    points: Sequence[Point]
    made: Point | None
    types: Mapping[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """Settings of the search. tokens: taken from the text for the search, and again for the report.

    window: tokens that see each other. steps: steps of the evolution for each size; 0: only what
    the quick proxy says. memory: budget of the engine that measures; None: 1 GiB or what it needs.
    """

    tokens: int = 1024
    window: int = 512
    steps: int = 24
    seed: int = 0
    memory: str | int | None = None

    def __post_init__(self) -> None:
        for name, low in (("tokens", 2), ("window", 2), ("steps", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise OptionError(f"{name}: expected at least {low}, found {getattr(self, name)}")


@checked
def adapt(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    text: str,
    *,
    bits: float | None = None,
    nbytes: int | None = None,
    loss: float | None = None,
    types: Sequence[str] = DEFAULT_TYPES,
    curve: int = 0,
    imatrix: str | os.PathLike[str] | None = None,
    search: Search | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Adapted:
    """Chooses a tensor type for each expert matrix of a GGUF mixture, and writes the model.

    One bound: bits a weight of the experts, nbytes of the whole file, or loss, the share by which
    the perplexity of the search's text may grow (the smallest file within it is made). out: None
    with a curve only. types: what may be allotted, beside the source's own; types wider than those
    of the source are left out, blocks that do not divide a matrix's rows fall back as in
    `quantize`. curve: how many further sizes are measured, evenly between the smallest and the
    largest, together with every uniform type. imatrix: a file; None measures one on the text.

    Matrices of a layer that have one type in common are written joined, as every GGUF program reads
    them; others as one tensor for each expert. The file appears under its name when it is complete;
    an interrupted call leaves hidden files beside it that the same call goes on from.
    Raises OptionError, ModelFileError, UnsupportedModelError, DeviceError.
    """
    bounds = [b for b in (bits, nbytes, loss) if b is not None]
    if len(bounds) != (0 if out is None else 1):
        raise OptionError(
            "expected one of bits, nbytes and loss" if out is not None else "expected an output"
        )
    if out is None and curve < 1:
        raise OptionError("expected an output, a curve, or both")
    path = Path(source)
    beside = _beside(path, out)
    check_output(beside, [path] if path.exists() else [], force=force or out is None)
    mixes.check_types("types", types)
    work = _Adapting(
        path,
        beside,
        types,
        search=search or Search(),
        threads=threads or os.cpu_count() or 1,
        progress=progress,
    )
    try:
        work.measure_importance(text, imatrix)
        work.prepare(text)
        points = work.curve(curve)
        made, used = None, Counter[tuple[str, str]]()
        if out is not None:
            choice, made = work.choose(bits=bits, nbytes=nbytes, loss=loss)
            work.write(beside, choice, force=force)
            used = work.used(choice)
            points = [*points, made]
    except StokerError as error:
        if not isinstance(error, Cancelled):
            work.clean()
        raise
    work.clean()
    points = sorted(set(points), key=lambda p: (p.bits, p.kl))
    return Adapted(None if out is None else beside, work.source_point, points, made, used)


def resumable_part(
    source: str | os.PathLike[str], out: str | os.PathLike[str] | None
) -> Path | None:
    """A file that an interrupted `adapt` has left to go on from, None if there is none."""
    left = _hidden(_beside(Path(source), out)).values()
    return next((path for path in left if path.exists()), None)


def _beside(source: Path, out: str | os.PathLike[str] | None) -> Path:
    """The path that the hidden files lie beside."""
    return source.with_name(f"{source.name}.curve") if out is None else Path(out)


def _hidden(beside: Path) -> dict[str, Path]:
    kinds = ("imatrix", "store", "found")
    return {kind: beside.with_name(f".{beside.name}.{kind}") for kind in kinds}


class _Adapting:
    """One call of `adapt`."""

    def __init__(
        self,
        path: Path,
        out: Path,
        types: Sequence[str],
        *,
        search: Search,
        threads: int,
        progress: Progress | None,
    ) -> None:
        self._path, self._search, self._threads = path, search, threads
        self._progress = progress
        self._file = GgufFile(str(path))
        self._matrices = expert_matrices(self._file)
        self._types = [_levels(m, types) for m in self._matrices]
        self._asked = [t for t in types if any(t in row for row in self._types)]
        self._rest = rest_of(self._file, self._matrices)
        self._weights = sum(m.rows * m.cols for m in self._matrices)
        n = max(map(len, self._types))
        self._nbytes = np.zeros((len(self._matrices), n), dtype=np.int64)
        for i, (matrix, row) in enumerate(zip(self._matrices, self._types, strict=True)):
            self._nbytes[i, : len(row)] = [matrix_bytes(matrix, t) for t in row]
        # Bytes of the file that are not experts' weights, with the longest header that it can have.
        single = [*self._rest, *(single_tensor(m, m.type) for m in self._matrices)]
        size = gguf_writer.layout(model_metadata(self._file), single).size
        self._around = size - sum(m.nbytes for m in self._matrices)
        # Errors are comparable within a group: layers and parts, in the order of the matrices.
        layers = sorted({m.layer for m in self._matrices})
        self._layer = np.array([layers.index(m.layer) for m in self._matrices])
        self._part = np.array([PARTS.index(m.part) for m in self._matrices])
        self._group = self._layer * len(PARTS) + self._part
        self._hidden = _hidden(out)
        self._found: dict[str, Measurement] = {}

    # ---- preparation

    def measure_importance(self, text: str, given: str | os.PathLike[str] | None) -> None:
        """The importances: from a file, or measured on the part of the text that is searched on."""
        if given is None:
            hidden = self._hidden["imatrix"]
            name = hashlib.sha256(
                repr((source_digest(self._file), text, self._search)).encode()
            ).hexdigest()
            found = None
            if hidden.exists():
                found = Imatrix.read(hidden)
            if found is None or list(found.datasets) != [name]:
                found, _ = importances.collect(
                    self._path,
                    hidden,
                    text,
                    name=name,
                    chunk=self._search.window,
                    max_chunks=max(1, self._search.tokens // self._search.window),
                    memory=self._search.memory or "auto",
                    threads=self._threads,
                    force=True,
                    progress=self._progress,
                )
        else:
            found = Imatrix.read(given)
        self._digest = found.digest
        self._quantizer = ExpertQuantizer(self._file, found, self._threads)

    def prepare(self, text: str) -> None:
        """Computes the proxy's costs, the store, and the layers' weights that measurement gives."""
        self._cost = self._proxy()
        texts = cut_text(self._path, text, tokens=self._search.tokens, window=self._search.window)
        recipe = repr((_RECIPE_VERSION, source_digest(self._file), self._digest, self._search))
        self._judge = Judge(self._path, texts, memory=self._search.memory, threads=self._threads)
        self._store = MixedPrecisionStore(
            self._hidden["store"], self._file, self._matrices, self._types, recipe=recipe
        )
        self._store.make(self._quantizer.convert, self._progress)
        asked = repr((recipe, self._types, texts))
        self._judge.resume(self._hidden["found"], hashlib.sha256(asked.encode()).hexdigest())
        self._weight = np.zeros(int(self._group.max()) + 1)  # logarithms, by group
        if self._search.steps:
            self._weight = self._measured_weights()

    def _proxy(self) -> Floats:
        """Relative squared error of every matrix in every level, [matrices, levels]."""
        cost = np.full(self._nbytes.shape, np.inf)
        signal = np.zeros(int(self._group.max()) + 1)
        for i, (matrix, row) in enumerate(zip(self._matrices, self._types, strict=True)):
            errors, own = self._quantizer.errors(matrix, row, _SAMPLED_ROWS)
            cost[i, : len(row)] = errors
            signal[self._group[i]] += own
            self._report("errors", i + 1, len(self._matrices))
        signal = np.maximum(signal, np.finfo(np.float64).tiny)
        return np.asarray(cost / signal[self._group][:, None])

    def _measured_weights(self) -> Floats:
        """How much divergence the proxy's errors cost, as logarithms by group.

        Each layer alone, then each part alone, goes to its smallest types; the others stay as they
        are in the source.
        """
        n_layer = int(self._layer.max()) + 1
        best, least = self._source_choice(), self._smallest_choice()
        low = self._cost[np.arange(len(least)), least]
        rates = []
        for of, n in ((self._layer, n_layer), (self._part, len(PARTS))):
            found = np.zeros(n)
            for i in range(n):
                kl = self._measure(np.where(of == i, least, best), "search").kl
                error = float(low[of == i].sum())
                found[i] = math.log(max(kl, 1e-9) / error) if error > 0 else 0.0
                self._report(
                    "sensitivity",
                    (0 if of is self._layer else n_layer) + i + 1,
                    n_layer + len(PARTS),
                )
            rates.append(found - found.mean())
        return np.asarray(rates[0][:, None] + rates[1][None, :]).reshape(-1)

    # ---- choices

    def _allocation(self, weight: Floats) -> BitAllocation:
        return BitAllocation(self._cost * np.exp(weight)[self._group][:, None], self._nbytes)

    def _source_choice(self) -> Choice:
        return np.array(
            [row.index(m.type) for m, row in zip(self._matrices, self._types, strict=True)]
        )

    def _smallest_choice(self) -> Choice:
        return np.array(
            [
                int(np.argmin(n[: len(row)]))
                for n, row in zip(self._nbytes, self._types, strict=True)
            ]
        )

    def _uniform(self, type: str) -> Choice:
        """Every matrix in a type, or in what it falls back to, or as in the source if smaller."""
        return np.array(
            [
                row.index(_fitting(m, type))
                for m, row in zip(self._matrices, self._types, strict=True)
            ]
        )

    def _bytes(self, choice: Choice) -> int:
        return int(self._nbytes[np.arange(len(choice)), choice].sum())

    def _best(self, budget: int, label: str) -> Choice:
        """The least divergence that the search finds for at most `budget` bytes of experts."""
        proxy = np.zeros_like(self._weight)
        starts = [self._allocation(self._weight).choose(budget)]
        if self._search.steps:
            starts.append(self._allocation(proxy).choose(budget))
            starts += [c for c in map(self._uniform, self._asked) if self._bytes(c) <= budget]
        else:
            return starts[0]
        measured = [self._measure(c, "search").kl for c in starts]
        at = int(np.argmin(measured))
        best, kl = starts[at], measured[at]
        weight = (self._weight if at != 1 else proxy).copy()
        rng = np.random.default_rng([self._search.seed, budget])
        for step in range(self._search.steps):
            changed = rng.random(len(weight)) < _CHANGED
            offspring = weight + np.where(changed, rng.normal(0, _STEP, len(weight)), 0.0)
            choice = self._allocation(offspring).choose(budget)
            found = self._measure(choice, "search").kl
            if found < kl:
                best, kl, weight = choice, found, offspring
            self._report(label, step + 1, self._search.steps)
        return best

    def curve(self, n: int) -> list[Point]:
        """Every uniform type, an adapted allocation of the same size, and n sizes between."""
        if n < 1:
            return []
        points = []
        sizes = []
        for type in self._asked:
            choice = self._uniform(type)
            points.append(self._point(choice, type))
            sizes.append(self._bytes(choice))
        low, high = self._bytes(self._smallest_choice()), self._bytes(self._source_choice())
        sizes += [int(s) for s in np.linspace(low, high, n + 2)[1:-1]]
        for size in sorted(set(sizes)):
            if low < size < high:
                label = f"{8 * size / self._weights:.2f} bits"
                points.append(self._point(self._best(size, label), ""))
        return points

    def choose(
        self, *, bits: float | None, nbytes: int | None, loss: float | None
    ) -> tuple[Choice, Point]:
        """The choice for one bound. Raises OptionError if it cannot be met."""
        low, high = self._bytes(self._smallest_choice()), self._bytes(self._source_choice())
        if loss is not None:
            return self._within(loss, low, high)
        budget = int(bits * self._weights / 8) if bits is not None else 0
        if nbytes is not None:
            budget = nbytes - self._around
        if budget < low:
            raise OptionError(
                f"expected at least {8 * low / self._weights:.2f} bits a weight of the experts or "
                f"a file of {low + self._around} bytes, found "
                f"{8 * max(budget, 0) / self._weights:.2f} bits: allow smaller types"
            )
        best = self._best(min(budget, high), "search")
        return best, self._point(best, "")

    def _within(self, loss: float, low: int, high: int) -> tuple[Choice, Point]:
        """The smallest choice whose perplexity on the search's text is within the loss."""
        limit = self._judge.source["search"].nll + math.log1p(loss)
        allocation = self._allocation(self._weight)
        least = allocation.choose(low)
        if self._measure(least, "search").nll <= limit:
            return least, self._point(least, "")
        for i in range(_BISECTIONS):
            middle = (low + high) // 2
            if self._measure(allocation.choose(middle), "search").nll <= limit:
                high = middle
            else:
                low = middle
            self._report("size", i + 1, _BISECTIONS)
        best = self._best(high, "search")
        return best, self._point(best, "")

    # ---- measuring

    @property
    def source_point(self) -> Point:
        """The source itself."""
        choice = self._source_choice()
        report = self._judge.source["report"]
        return Point("source", *self._size(choice), 0.0, math.exp(min(report.nll, 700.0)))

    def _size(self, choice: Choice) -> tuple[int, float]:
        tensors, _ = self._tensors(choice)
        nbytes = gguf_writer.layout(model_metadata(self._file), tensors).size
        return nbytes, 8 * self._bytes(choice) / self._weights

    def _point(self, choice: Choice, uniform: str) -> Point:
        found = self._measure(choice, "report")
        ppl = math.exp(min(found.nll, 700.0))
        return Point(uniform, *self._size(choice), found.kl, ppl)

    def _measure(self, choice: Choice, text: str) -> Measurement:
        if np.array_equal(choice, self._source_choice()):
            return self._judge.source[text]
        key = hashlib.sha256(choice.astype(np.int64).tobytes()).hexdigest()
        known = self._judge.known(key, text)
        if known is not None:
            return known
        self._store.select(choice)
        return self._judge.measure(key, self._store.path, text)

    # ---- the file

    def used(self, choice: Choice) -> Counter[tuple[str, str]]:
        """Counts the matrices by part and type."""
        return Counter(
            (m.part, row[int(level)])
            for m, row, level in zip(self._matrices, self._types, choice, strict=True)
        )

    def _tensors(
        self, choice: Choice
    ) -> tuple[list[Tensor], dict[str, list[tuple[ExpertMatrix, str]]]]:
        """The file's directory, and the matrices that make up each tensor of experts."""
        chosen: dict[str, list[tuple[ExpertMatrix, str]]] = {}
        for matrix, row, level in zip(self._matrices, self._types, choice, strict=True):
            name = joined_name(matrix.layer, matrix.part)
            chosen.setdefault(name, []).append((matrix, row[int(level)]))
        tensors, members_of = list(self._rest), {}
        for name, members in chosen.items():
            if len({type for _, type in members}) == 1:
                one = single_tensor(*members[0])
                shape = (*one.shape, len(members))
                tensors.append(Tensor(name, shape, one.type, one.nbytes * len(members)))
                members_of[name] = members
                continue
            for matrix, type in members:
                tensors.append(single_tensor(matrix, type))
                members_of[matrix.name] = [(matrix, type)]
        return tensors, members_of

    def write(self, out: Path, choice: Choice, *, force: bool) -> None:
        """Writes the model."""
        tensors, members_of = self._tensors(choice)

        def data(tensor: Tensor, start: int) -> Iterator[npt.NDArray[np.uint8]]:
            members = members_of.get(tensor.name)
            if members is None:
                yield from copied(self._file, tensor.name, start)
                return
            each = tensor.nbytes // len(members)
            for matrix, type in members[start // each :]:
                yield self._quantizer.convert(matrix, type)

        digest = hashlib.sha256(repr((self._digest, source_digest(self._file))).encode())
        write_model(
            out,
            model_metadata(self._file),
            tensors,
            data,
            recipe=digest.hexdigest(),
            inputs=self._file.shards,
            force=force,
            progress=self._progress,
        )

    def clean(self) -> None:
        """Removes the hidden files."""
        for path in self._hidden.values():
            path.unlink(missing_ok=True)

    def _report(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)


def _fitting(matrix: ExpertMatrix, type: str) -> str:
    """The type, as far as the matrix's rows and the source's width allow."""
    fitting = mixes.fitting(type, matrix.cols)
    return fitting if _bits(fitting) < _bits(matrix.type) else matrix.type


def _levels(matrix: ExpertMatrix, types: Sequence[str]) -> list[str]:
    """Types that a matrix may get, by size; the source's own type is the largest."""
    found = {_fitting(matrix, type) for type in types} | {matrix.type}
    return sorted(found, key=lambda t: (_bits(t), t))


def _bits(type: str) -> float:
    form = format_row(type)
    return 8 * int(form["bytes"]) / int(form["block"])

"""Recorded routing: the experts that each token used at each layer.

The content tells these formats apart, compressed with gzip or not:

* ours: CSV with the columns step, phase, layer, slot, expert, weight and optionally hit, wait_us,
  token (its number in the vocabulary) and sequence (a number that the tokens of one text have in
  common; tokens of several that are decoded together have the same step);
* BigMoeOnEdge's route.csv: turn, phase, step, layer, slot, expert, weight, residency, expert_bytes;
* waste's JSON lines: {"tok": 0, "layers": [[expert, ...], ...]}.

Both CSV forms may begin with lines "# key=value ...": n_layer, n_expert, n_expert_used, and
"# layer=0 expert_bytes=3059712" for each layer. Rows are in the order of the forward pass: all
tokens of a prompt's chunk pass a layer before the next layer begins.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ...runtime.base.errors import OptionError
from ...runtime.files.output_file import check_output

PREFILL, DECODE = "prefill", "decode"
_MAX_LAYER = 1 << 12
_MAX_EXPERT = 1 << 16
_MAX_LINE = 1 << 20  # characters; a line of JSON holds a token's routing of all layers
_COLUMNS = ("step", "phase", "layer", "slot", "expert", "weight")


@dataclass(frozen=True)
class Trace:
    """Routing in the order of the forward pass. A visit is one token at one layer.

    Consecutive visits of one evaluation and layer are one chunk of a prompt.
    """

    n_layer: int
    n_expert: int  # experts of a layer
    n_expert_used: int  # experts that a token uses in a layer
    evaluation: npt.NDArray[np.int64]  # [visits] ascending from 0
    layer: npt.NDArray[np.int32]  # [visits] ascending within an evaluation
    step: npt.NDArray[np.int64]  # [visits] number of the token within its phase
    offset: npt.NDArray[np.int64]  # [visits + 1] first use of each visit
    expert: npt.NDArray[np.int32]  # [uses] distinct within a visit
    weight: npt.NDArray[np.float32]  # [uses] the router's weights
    decode: npt.NDArray[np.bool_]  # [evaluations] False: a prompt's chunk
    tokens: npt.NDArray[np.int64]  # [evaluations]
    expert_bytes: npt.NDArray[np.int64] | None = None  # [n_layer] bytes of one expert
    token: npt.NDArray[np.int32] | None = None  # [visits] ids in the vocabulary
    sequence: npt.NDArray[np.int64] | None = None  # [visits] ids of sequences; None: one sequence

    @property
    def n_tokens(self) -> int:
        """The number of tokens of all evaluations."""
        return int(self.tokens.sum())

    def without_prompts(self) -> Trace:
        """Returns only the decoded tokens, for a replay with a cold cache. OptionError for none."""
        keep = self.decode[self.evaluation]
        if not keep.any():
            raise OptionError("expected decoded tokens, found only prompts")
        uses = np.diff(self.offset)
        kept_uses = np.repeat(keep, uses)
        number = np.cumsum(self.decode) - 1  # index of each evaluation among those kept
        return replace(
            self,
            evaluation=number[self.evaluation[keep]].astype(np.int64),
            layer=self.layer[keep],
            step=self.step[keep],
            offset=np.concatenate([[0], np.cumsum(uses[keep])]).astype(np.int64),
            expert=self.expert[kept_uses],
            weight=self.weight[kept_uses],
            decode=self.decode[self.decode],
            tokens=self.tokens[self.decode],
            token=None if self.token is None else self.token[keep],
            sequence=None if self.sequence is None else self.sequence[keep],
        )


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Reads a trace in any of the formats. Raises OptionError naming file, line and fault."""
    name = str(path)
    line = 0
    try:
        with _open(Path(path)) as file:
            lines = _Lines(file)
            try:
                return _read(lines)
            finally:
                line = lines.number
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from None
    except _Fault as fault:
        raise OptionError(f"{name}: line {line}: {fault}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise OptionError(f"{name}: truncated or damaged gzip data after line {line}") from None
    except UnicodeDecodeError:
        raise OptionError(f"{name}: expected text, found other bytes after line {line}") from None
    except OSError as error:
        raise OptionError(f"cannot read {name}: {error.strerror or error}") from error


class _Fault(Exception):
    """An error in the line just read."""


def _open(path: Path) -> IO[str]:
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    if compressed:
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


class _Lines:
    """Reads the lines of a file and counts them; lines of _MAX_LINE or more are errors."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(_MAX_LINE):
            self.number += 1
            if len(line) == _MAX_LINE:
                raise _Fault(f"expected at most {_MAX_LINE - 1} characters a line")
            stripped = line.strip()
            if stripped:
                yield stripped


def _read(lines: _Lines) -> Trace:
    rows = _Rows()
    source = iter(lines)
    for line in source:
        if line.startswith("#"):
            rows.comment(line)
        elif line.startswith("{"):
            _read_jsonl(line, source, rows)
        else:
            _read_csv(line, source, rows)
    return rows.trace()


def _read_csv(header: str, source: Iterator[str], rows: _Rows) -> None:
    columns = header.split(",")
    try:
        step, phase, layer, slot, expert, weight = (columns.index(name) for name in _COLUMNS)
    except ValueError:
        raise _Fault(
            f"expected JSON lines or the columns {', '.join(_COLUMNS)}, found {header[:80]!r}"
        ) from None
    turn = columns.index("turn") if "turn" in columns else phase
    size = columns.index("expert_bytes") if "expert_bytes" in columns else None
    token = columns.index("token") if "token" in columns else None
    sequence = columns.index("sequence") if "sequence" in columns else None
    for line in source:
        if line.startswith("#"):
            rows.comment(line)
            continue
        cells = line.split(",")
        if len(cells) != len(columns):
            raise _Fault(f"expected {len(columns)} columns, found {len(cells)}")
        at_layer = _number(cells[layer], "layer", _MAX_LAYER)
        rows.use(
            (cells[turn], cells[phase]),
            cells[phase] in (DECODE, "1"),
            _number(cells[step], "step"),
            at_layer,
            _number(cells[slot], "slot", _MAX_EXPERT),
            expert=_number(cells[expert], "expert", _MAX_EXPERT),
            weight=_weight(cells[weight]),
            token=None if token is None else _number(cells[token], "token", 1 << 31),
            sequence=None if sequence is None else _number(cells[sequence], "sequence"),
        )
        if size is not None and cells[size] != "0":  # 0: the expert was resident
            rows.bytes_of(at_layer, _number(cells[size], "expert_bytes"))


def _read_jsonl(first: str, source: Iterator[str], rows: _Rows) -> None:
    line: str | None = first
    while line is not None:
        try:
            document = json.loads(line)
            token, layers = document["tok"], document["layers"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _Fault('expected {"tok": number, "layers": [[expert, ...], ...]}') from None
        if not isinstance(layers, list):
            raise _Fault("layers: expected a list")
        for layer, experts in enumerate(layers):
            if not isinstance(experts, list):
                raise _Fault(f"layer {layer}: expected a list of experts")
            for slot, expert in enumerate(experts):
                rows.use(
                    (),
                    True,
                    _checked(token, "tok"),
                    _checked(layer, "layer", _MAX_LAYER),
                    slot,
                    expert=_checked(expert, "expert", _MAX_EXPERT),
                    weight=1.0 / len(experts),  # the format has no weights
                )
        line = next(source, None)


def _number(cell: str, what: str, limit: int = 1 << 62) -> int:
    try:
        value = int(cell) if len(cell) < 20 else -1
    except ValueError:
        value = -1
    if not 0 <= value < limit:
        raise _Fault(f"{what}: expected a whole number below {limit}, found {cell[:40]!r}")
    return value


def _checked(value: object, what: str, limit: int = 1 << 62) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
        raise _Fault(
            f"{what}: expected a whole number below {limit}, found {str(value)[:40]!r}"
        ) from None
    return value


def _weight(cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _Fault(f"weight: expected a number, found {cell[:40]!r}")
    return value


@dataclass
class _Rows:
    """Collects uses in file order and groups them into visits and evaluations."""

    shape: dict[str, int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)  # layer -> bytes of an expert
    evaluation: list[int] = field(default_factory=list)
    layer: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    expert: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    token: list[int] = field(default_factory=list)
    sequence: list[int] = field(default_factory=list)
    decode: list[bool] = field(default_factory=list)
    # (step, sequence) of the tokens of each evaluation.
    steps: list[set[tuple[int, int]]] = field(default_factory=list)
    _part: tuple[str, ...] | None = None  # turn and phase of the last row
    _seen: set[int] = field(default_factory=set)  # experts of this visit

    def comment(self, line: str) -> None:
        """Reads a line of key=value pairs; unknown keys are ignored."""
        pairs = dict(word.split("=", 1) for word in line.split() if "=" in word)
        for key, limit in (
            ("n_layer", _MAX_LAYER),
            ("n_expert", _MAX_EXPERT),
            ("n_expert_used", _MAX_EXPERT),
        ):
            if key in pairs:
                self.shape[key] = _number(pairs[key], key, limit)
        if "layer" in pairs and "expert_bytes" in pairs:
            self.bytes_of(
                _number(pairs["layer"], "layer", _MAX_LAYER),
                _number(pairs["expert_bytes"], "expert_bytes"),
            )

    def bytes_of(self, layer: int, nbytes: int) -> None:
        """Notes that an expert of this layer has `nbytes` bytes."""
        if self.sizes.setdefault(layer, nbytes) != nbytes:
            raise _Fault(
                f"layer {layer}: expected experts of {self.sizes[layer]} bytes, found {nbytes}"
            )

    def use(
        self,
        part: tuple[str, ...],
        decode: bool,
        step: int,
        layer: int,
        slot: int,
        *,
        expert: int,
        weight: float,
        token: int | None = None,
        sequence: int | None = None,
    ) -> None:
        """Adds one expert of one token at one layer; `part` is its turn and phase."""
        # A forward pass visits layers in ascending order, so that a lower one begins the next
        # evaluation. In decode all tokens of an evaluation have the same step.
        if part != self._part or layer < self.layer[-1] or (decode and step != self.step[-1]):
            self._part = part
            self.decode.append(decode)
            self.steps.append(set())
            new_visit = True
        else:
            new_visit = layer != self.layer[-1] or step != self.step[-1]
            if sequence is not None:
                new_visit = new_visit or sequence != self.sequence[-1]
        if new_visit:
            self.evaluation.append(len(self.decode) - 1)
            self.layer.append(layer)
            self.step.append(step)
            self.offset.append(len(self.expert))
            if token is not None:
                self.token.append(token)
            if sequence is not None:
                self.sequence.append(sequence)
            self.steps[-1].add((step, sequence or 0))
            self._seen.clear()
        if slot != len(self._seen):
            raise _Fault(f"expected slot {len(self._seen)} of the token's experts, found {slot}")
        if expert in self._seen:
            raise _Fault(f"expert {expert} twice for one token")
        self._seen.add(expert)
        self.expert.append(expert)
        self.weight.append(weight)

    def trace(self) -> Trace:
        """Returns the whole trace. Raises OptionError if shapes disagree or there are no rows."""
        if not self.expert:
            raise OptionError("expected a routing trace, found no rows")
        offset = np.array([*self.offset, len(self.expert)], np.int64)
        found = {
            "n_layer": max(self.layer) + 1,
            "n_expert": max(self.expert) + 1,
            "n_expert_used": int(np.diff(offset).max()),
        }
        for key, least in found.items():
            if self.shape.setdefault(key, least) < least:
                raise OptionError(f"expected {key}={self.shape[key]}, found {least}")
        n_layer = self.shape["n_layer"]
        sizes = None
        if all(layer in self.sizes for layer in range(n_layer)):
            sizes = np.array([self.sizes[layer] for layer in range(n_layer)], np.int64)
        return Trace(
            n_layer,
            self.shape["n_expert"],
            self.shape["n_expert_used"],
            np.array(self.evaluation, np.int64),
            np.array(self.layer, np.int32),
            np.array(self.step, np.int64),
            offset,
            np.array(self.expert, np.int32),
            np.array(self.weight, np.float32),
            np.array(self.decode, np.bool_),
            np.array([len(steps) for steps in self.steps], np.int64),
            sizes,
            np.array(self.token, np.int32) if self.token else None,
            np.array(self.sequence, np.int64) if self.sequence else None,
        )


class TraceWriter:
    """Writes our format as a model runs; a context manager.

    The file appears under its name when the writer is closed without an exception.

    Args:
        path: compressed if it ends in .gz.
        n_layer, n_expert, n_expert_used: those of the model.
        expert_bytes: [n_layer] bytes of one expert, if known.
        tokens: whether each visit names its token and its sequence.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_layer: int,
        n_expert: int,
        n_expert_used: int,
        expert_bytes: Sequence[int] | None = None,
        tokens: bool = False,
    ) -> None:
        self._tokens = tokens
        self._path = Path(path)
        self._part = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
        check_output(self._path)
        try:
            self._raw = self._part.open("wb")
        except OSError as error:
            raise OptionError(f"cannot write {self._path}: {error.strerror}") from error
        # With mtime 0 the same trace gives the same bytes.
        stream: Any = self._raw
        if self._path.suffix == ".gz":
            stream = gzip.GzipFile("", "wb", fileobj=self._raw, mtime=0)
        self._file = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        self._rows = csv.writer(self._file, lineterminator="\n")
        self._file.write("# stoker trace 1\n")
        self._file.write(f"# n_layer={n_layer} n_expert={n_expert} n_expert_used={n_expert_used}\n")
        for layer, nbytes in enumerate(expert_bytes or ()):
            self._file.write(f"# layer={layer} expert_bytes={nbytes}\n")
        self._rows.writerow(
            [*_COLUMNS, "hit", "wait_us", *(["token", "sequence"] if tokens else [])]
        )

    def visit(
        self,
        step: int,
        phase: str,
        layer: int,
        experts: Sequence[int],
        weights: Sequence[float],
        *,
        hits: Sequence[bool] | None = None,
        wait_us: Sequence[float] | None = None,
        token: int = 0,
        sequence: int = 0,
    ) -> None:
        """Writes one token at one layer; experts, weights, hits, wait_us: [n_expert_used] or empty.

        Args:
            step: number of the token within its phase; of those that are decoded together the same.
            phase: PREFILL or DECODE.
            hits: whether each expert was in the cache when it was asked for.
            wait_us: microseconds that the computation waited for each.
            token, sequence: its id in the vocabulary and that of its sequence, if the writer writes
                tokens.
        """
        for slot, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
            hit = "" if hits is None else int(hits[slot])
            wait = "" if wait_us is None else f"{wait_us[slot]:.1f}"
            row = [step, phase, layer, slot, expert, f"{weight:.6g}", hit, wait]
            self._rows.writerow([*row, token, sequence] if self._tokens else row)

    def close(self) -> None:
        """Renames the finished file to its name. Raises OptionError if it cannot be written."""
        try:
            self._file.close()
            self._raw.close()
            self._part.replace(self._path)
        except OSError as error:
            self.discard()
            raise OptionError(f"cannot write {self._path}: {error.strerror}") from error

    def discard(self) -> None:
        """Closes and deletes the unfinished file."""
        for stream in (self._file, self._raw):
            with suppress(OSError, ValueError):
                stream.close()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def write_trace(path: str | os.PathLike[str], trace: Trace) -> None:
    """Writes a whole trace in our format. Raises OptionError if the file cannot be written."""
    with TraceWriter(
        path,
        n_layer=trace.n_layer,
        n_expert=trace.n_expert,
        n_expert_used=trace.n_expert_used,
        expert_bytes=None if trace.expert_bytes is None else trace.expert_bytes.tolist(),
        tokens=trace.token is not None,
    ) as writer:
        for v, layer in enumerate(trace.layer.tolist()):
            uses = slice(int(trace.offset[v]), int(trace.offset[v + 1]))
            writer.visit(
                int(trace.step[v]),
                DECODE if trace.decode[trace.evaluation[v]] else PREFILL,
                layer,
                trace.expert[uses].tolist(),
                trace.weight[uses].tolist(),
                token=0 if trace.token is None else int(trace.token[v]),
                sequence=0 if trace.sequence is None else int(trace.sequence[v]),
            )

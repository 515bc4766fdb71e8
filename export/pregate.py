"""Pre-gated mixtures: each layer's experts are known one layer ahead.

The first mixture layer keeps its router. In every other one a gate at the mixture layer before
chooses the experts, so that their reads overlap that layer's experts and the next attention; the
layer's own router still weighs the chosen ones against each other. A file of this kind has an
architecture of its own ("pregated-llama"), which other engines refuse. For layer i, with the next
mixture layer j:

    blk.i.ffn_pregate.weight  F32 [n_embd, n_expert]: from what layer i's router reads ...
    blk.i.ffn_pregate.bias    F32 [n_expert]: ... to scores by which layer j's experts are chosen
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..offload.profile.hidden_states import own_text
from ..runtime.base.checked_call import checked
from ..runtime.base.errors import ModelFileError, OptionError, UnsupportedModelError
from ..runtime.base.progress import Progress
from ..runtime.files.output_file import check_output
from .mixture.gates import Agreement, Floats, Gate, Routing, agreement, fit_gates, record
from .quantize import source_digest
from .writer import gguf_writer
from .writer.gguf_writer import Layout, PartFile, Tensor
from .writer.model_writer import Piece, making, read_bytes, resumable_part, write_pieces
from .writer.tensor_types import format_row

if TYPE_CHECKING:
    from ..runtime._core import GgufFile, TensorInfo
    from ..runtime.model import Model

__all__ = ["ARCHITECTURES", "Pregated", "pregate", "resumable_part"]

ARCHITECTURES = ("llama", "qwen2moe", "qwen3moe", "olmoe", "smallthinker")
PREFIX = "pregated-"

_RECIPE_VERSION = 1  # changes if the same arguments make other bytes
_WINDOW = 512  # tokens of a text that see each other
_HELD_OUT = 8  # one window in so many is kept to measure on
_LEAST_TOKENS = 256
_STATE_BYTES = 4 << 30  # bytes of hidden states in a file
_PIECE_BYTES = 32 << 20
_ROUTER, _GATE = "ffn_gate_inp.weight", "ffn_pregate"


@dataclass(frozen=True)
class Pregated:
    """The result and its costs.

    tokens: number fitted on; held_out: number measured on. base_perplexity, perplexity: of the
    base and of the new model on the latter, each window by itself. gates: how their choices
    agree with the routers', on the pre-gated model's own states.
    """

    path: Path
    nbytes: int
    tokens: int
    held_out: int
    base_perplexity: float
    perplexity: float
    gates: tuple[Agreement, ...]


@checked
def pregate(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    text: str | None = None,
    test_text: str | None = None,
    tokens: int = 32768,
    minutes: float = 10.0,
    seed: int = 0,
    threads: int | None = None,
    memory: int | str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> Pregated:
    """Makes a mixture whose experts are chosen one layer ahead.

    base: a mixture of one of ARCHITECTURES. text: fits the gates, by its first `tokens`
    tokens; None lets the base write it. test_text: text to measure on; None keeps an eighth
    of the text aside. minutes: of training the gates, at most; if they are enough, the seed
    decides every byte. threads, memory: of the models while they run, see LoadOptions.

    The file appears under its name only when it is complete. An interrupted call leaves a hidden
    part beside it, and the same call goes on from there. An existing `out` is replaced only with
    `force`. progress: called with (what is done, how much of it, of how much).
    Raises OptionError, ModelFileError, UnsupportedModelError; DeviceError if the disk is full.
    """
    from ..runtime._core import GgufFile

    path, base_path = Path(out), Path(base)
    if not minutes > 0:
        raise OptionError(f"minutes: expected more than 0, found {minutes}")
    if tokens < _LEAST_TOKENS:
        raise OptionError(f"tokens: expected at least {_LEAST_TOKENS}, found {tokens}")
    file = GgufFile(str(base_path))
    mixture = _Mixture(file)
    check_output(path, file.shards, force=force)
    layout = gguf_writer.layout(_metadata(file, mixture), mixture.tensors())
    options = [tokens, minutes, seed, *(_digest(t) for t in (text, test_text))]
    recipe = json.dumps([_RECIPE_VERSION, source_digest(file), options])
    work = _Pregating(base_path, mixture, layout, progress, threads=threads, memory=memory)
    work.prepare(text, test_text, tokens, seed)
    with making(path, layout.size, hashlib.sha256(recipe.encode()).hexdigest()) as part:
        if part.done == 0:
            part.write(0, layout.header)
            work.fit(part, 60 * minutes, seed)
            part.commit(1)
        work.copy(part)
    nll, agreements = work.measure(path)
    return Pregated(
        path,
        layout.size,
        sum(map(len, work.learnt)),
        sum(map(len, work.held_out)),
        math.exp(work.base_nll),
        math.exp(nll),
        tuple(agreements),
    )


def _digest(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


class _Mixture:
    """The base: its routers, and the directory of the pre-gated file."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        architecture = file.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{file.path}: general.architecture: expected one of {', '.join(ARCHITECTURES)}, "
                f"found {architecture}"
            )
        self.architecture = str(architecture)
        self._tensors: dict[str, TensorInfo] = {t.name: t for t in file.tensors}
        self.layers = [i for i in range(self._size("block_count")) if _router(i) in self._tensors]
        if len(self.layers) < 2:
            raise UnsupportedModelError(
                f"{file.path}: expected a mixture of experts in at least 2 layers, found "
                f"{len(self.layers)}"
            )
        self.n_embd, self.n_expert = self._size("embedding_length"), self._size("expert_count")
        gating = file.get(f"{architecture}.expert_gating_func")
        self.routing = Routing(
            {i: self._values(_router(i)) for i in self.layers},
            self._size("expert_used_count"),
            architecture == "smallthinker" and gating == 2,
        )

    def _size(self, name: str) -> int:
        key = f"{self.architecture}.{name}"
        value = self.file.get(key)
        if not isinstance(value, int) or value < 1:
            raise ModelFileError(f"{self.file.path}: {key}: expected a positive integer")
        return value

    def _values(self, name: str) -> Floats:
        from ..runtime._core import dequantize

        tensor = self._tensors[name]
        expected = (self.n_embd, self.n_expert)
        if tuple(tensor.shape) != expected:
            raise ModelFileError(
                f"{self.file.path}: tensor {name}: expected shape {list(expected)}, found "
                f"{list(tensor.shape)}"
            )
        data = self.bytes_of(name, 0, tensor.nbytes)
        values = dequantize(tensor.type, data, math.prod(expected)).reshape(expected[::-1])
        if not np.isfinite(values).all():
            raise ModelFileError(f"{self.file.path}: tensor {name} has values that are not finite")
        return values

    def bytes_of(self, name: str, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Part of a tensor."""
        tensor = self._tensors[name]
        try:
            return read_bytes(self.file.shards[tensor.shard], tensor.offset + offset, nbytes)
        except OSError as error:
            raise ModelFileError(f"{self.file.path}: tensor {name}: {error}") from error

    def tensors(self) -> list[Tensor]:
        """The directory: the base's rows, each gate behind its layer's router."""
        rows = []
        gated = {_router(i): i for i, _ in self.routing.pairs}
        for t in self._tensors.values():
            try:
                type_id = format_row(t.type)["id"]
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{self.file.path}: tensor {t.name}: {error}") from None
            rows.append(Tensor(t.name, tuple(t.shape), type_id, t.nbytes))
            if t.name in gated:
                prefix = f"blk.{gated[t.name]}.{_GATE}"
                shape = (self.n_embd, self.n_expert)
                rows.append(Tensor(prefix + ".weight", shape, 0, 4 * math.prod(shape)))
                rows.append(Tensor(prefix + ".bias", (self.n_expert,), 0, 4 * self.n_expert))
        return rows

    def copies(self) -> Iterator[tuple[str, int, int]]:
        """(tensor, offset, bytes) of every piece of the base's tensors."""
        for t in self._tensors.values():
            for at in range(0, t.nbytes, _PIECE_BYTES):
                yield t.name, at, min(_PIECE_BYTES, t.nbytes - at)


def _router(layer: int) -> str:
    return f"blk.{layer}.{_ROUTER}"


def _metadata(file: GgufFile, mixture: _Mixture) -> dict[str, bytes]:
    """The base's metadata, with the new architecture in place of the old one."""
    old = mixture.architecture + "."
    entries: dict[str, bytes] = {}
    for key, value in gguf_writer.read_metadata(file.shards[0]).items():
        if not key.startswith("split."):
            entries[PREFIX + key if key.startswith(old) else key] = value
    entries["general.architecture"] = gguf_writer.string(PREFIX + mixture.architecture)
    name = file.get("general.name") or Path(file.path).stem
    entries["general.name"] = gguf_writer.string(f"{name}, pre-gated")
    return entries


class _Pregating:
    """One run of `pregate`."""

    def __init__(
        self,
        base: Path,
        mixture: _Mixture,
        layout: Layout,
        progress: Progress | None,
        *,
        threads: int | None,
        memory: int | str,
    ) -> None:
        self._base, self._mixture, self._layout = base, mixture, layout
        self._progress, self._threads, self._memory = progress, threads, memory
        self.learnt: list[list[int]] = []
        self.held_out: list[list[int]] = []
        self.base_nll = math.nan  # nats a token
        self._model: Model | None = None  # the base, until its states are recorded

    def prepare(self, text: str | None, test_text: str | None, tokens: int, seed: int) -> None:
        """Chooses the tokens, and measures the base on those held out."""
        model = self._model = self._open(self._base)
        n_layer, n_embd = int(model.config["n_layer"]), int(model.config["n_embd"])
        tokens = min(tokens, max(_LEAST_TOKENS, _STATE_BYTES // (2 * n_layer * n_embd)))
        if text is None:
            sequences = own_text(model, tokens, seed, self._progress)
        else:
            sequences = _windows(model, text, tokens)
        if test_text is None:
            self.held_out = sequences[_HELD_OUT - 1 :: _HELD_OUT] or sequences[-1:]
            del sequences[_HELD_OUT - 1 :: _HELD_OUT]
        else:
            self.held_out = _windows(model, test_text, max(_LEAST_TOKENS, tokens // _HELD_OUT))
        self.learnt = sequences
        n, held = sum(map(len, sequences)), sum(len(s) - 1 for s in self.held_out)
        if n < _LEAST_TOKENS or held < 1:
            raise OptionError(
                f"text: expected at least {_LEAST_TOKENS} tokens to learn from and some to "
                f"measure on, found {n} and {held}"
            )
        self.base_nll = self._nll(model)

    def fit(self, part: PartFile, seconds: float, seed: int) -> None:
        """Fits the gates to the states of the base, and writes them."""
        with tempfile.TemporaryDirectory(
            prefix=f".{part.path.name}.", dir=part.path.parent
        ) as folder:
            if self._model is None:
                raise ValueError("prepare() comes first")
            states = record(self._model, self.learnt, folder, self._progress)
            self._model = None
            gates = fit_gates(
                states,
                self._mixture.routing,
                seconds=seconds,
                seed=seed,
                progress=self._progress,
            )
            del states
        for layer, gate in gates.items():
            prefix = f"blk.{layer}.{_GATE}"
            part.write(self._layout.offsets[prefix + ".weight"], gate.weight.tobytes())
            part.write(self._layout.offsets[prefix + ".bias"], gate.bias.tobytes())

    def copy(self, part: PartFile) -> None:
        """Writes the base's tensors, from where an earlier call stopped."""
        self._model = None
        pieces = list(self._mixture.copies())
        total = sum(n for _, _, n in pieces)
        at = sum(n for _, _, n in pieces[: part.done - 1])

        def remaining() -> Iterator[Piece]:
            for done in range(part.done - 1, len(pieces)):
                name, offset, n = pieces[done]
                data = self._mixture.bytes_of(name, offset, n)
                yield Piece(self._layout.offsets[name] + offset, data, done + 2)

        def report(n: int) -> None:
            nonlocal at
            at += n
            if self._progress is not None:
                self._progress("tensors", at, total)

        write_pieces(part, remaining(), taken=report)

    def measure(self, path: Path) -> tuple[float, list[Agreement]]:
        """NLL (nats a token) and the gates' agreement of the new model, on held-out tokens."""
        model = self._open(path)
        nll = self._nll(model)
        gates = _read_gates(path, self._mixture.routing)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            states = record(model, self.held_out, folder)
            found = agreement(states, self._mixture.routing, gates)
            del states
        return nll, found

    def _nll(self, model: Model) -> float:
        sequence = model.engine.sequence()
        total, count = 0.0, 0
        for done, tokens in enumerate(self.held_out, 1):
            sequence.truncate(0)
            nll = sequence.eval_nll(np.asarray(tokens, dtype=np.int32))
            total, count = total + float(nll.sum()), count + len(nll)
            if self._progress is not None:
                self._progress("perplexity", done, len(self.held_out))
        return total / count

    def _open(self, path: Path) -> Model:
        from ..runtime.model import Model
        from ..runtime.options import LoadOptions

        trained = self._mixture.file.get(f"{self._mixture.architecture}.context_length")
        context = min(_WINDOW, trained) if isinstance(trained, int) and trained > 0 else _WINDOW
        options = LoadOptions(threads=self._threads, context=context, memory=self._memory)
        return Model(path, options)


def _windows(model: Model, text: str, n: int) -> list[list[int]]:
    """The first n tokens of a text in windows."""
    ids = model.tokenizer.encode(text, add_special=False, parse_special=False)[:n]
    window = model.engine.sequence().context
    return [ids[i : i + window] for i in range(0, len(ids), window)]


def _read_gates(path: Path, routing: Routing) -> Mapping[int, Gate]:
    """The gates of a model that was made."""
    from ..runtime._core import GgufFile

    file = GgufFile(str(path))
    tensors = {t.name: t for t in file.tensors}

    def values(name: str) -> Floats:
        t = tensors[name]
        return read_bytes(file.shards[t.shard], t.offset, t.nbytes).view(np.float32)

    gates = {}
    for layer, _ in routing.pairs:
        prefix = f"blk.{layer}.{_GATE}"
        bias = values(prefix + ".bias")
        gates[layer] = Gate(values(prefix + ".weight").reshape(len(bias), -1), bias)
    return gates

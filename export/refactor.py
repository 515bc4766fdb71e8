"""Refactors a dense model into a mixture whose experts are known before its second layer.

The first layer stays. After it, one small router looks at the residual stream and chooses the
experts of the token in all other layers at once. Their feed-forwards are taken apart: channels
that matter everywhere form the shared expert, the others belong to domains of tokens. Then the
down projections are fitted, layer by layer on what the layers before really give, so that they
make up for the channels that a token does without.

Source for the idea: Cai et al., Read-ME: Refactorizing LLMs as router-decoupled mixture of experts
with system co-design, 2024. The fit in closed form is ours; theirs trains for a billion tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..offload.profile.hidden_states import own_text
from ..runtime.base.checked_call import checked
from ..runtime.base.errors import OptionError, UnsupportedModelError
from ..runtime.base.progress import Progress
from ..runtime.files.output_file import check_output
from .mixture.channel_fit import ChannelFit
from .mixture.channel_split import Split, choose
from .mixture.dense_base import DenseBase
from .mixture.kmeans import spherical_kmeans, unit
from .mixture.llama_layers import Floats, Indices, LlamaLayer, LlamaLayers, rms_norm
from .mixture.refactor_recipe import Recipe, recipe
from .mixture.refactored_file import ARCHITECTURE, RefactoredFile
from .mixture.token_router import agreement, train

if TYPE_CHECKING:
    from ..runtime.model import Model

__all__ = ["ARCHITECTURE", "Refactored", "Stage", "refactor"]

_WINDOW = 256  # tokens that see each other
_DOMAIN_TOKENS = 16384  # tokens that domains and router are fitted on
_SPLIT_TOKENS = 8192  # tokens that importances are measured on
_HELD_OUT = 8192  # tokens at most, a tenth of the text at most, that perplexity is measured on
_OWN_TOKENS = 8192  # tokens that the model writes if there is no text
_STATE_BYTES = 1 << 30  # bytes of residual streams that are kept at once
_BATCH = 2048  # tokens whose channels are held at once
# On layers of SmolLM2, fitted to 13,000 tokens, 64 leave a fifth more error, 4096 no less.
_PRIOR_TOKENS = 1024.0
_MOST_TOKENS = 1 << 18  # most tokens of a fit
_LEAST_TOKENS = 2048

Routes = dict[tuple[int, ...], Indices]  # experts, ascending -> tokens that use them


@dataclass(frozen=True)
class Stage:
    """A model on the held-out text: its perplexity, and the weight bytes that a token reads."""

    perplexity: float
    token_bytes: int


@dataclass(frozen=True)
class Refactored:
    """The result: the file, its bytes, those of one expert, and what it cost.

    tokens: number that the fit saw, the mean over layers; agreement: the share of tokens that the
    router gives to the domain that they were clustered into. distilled: None if nothing was fitted.
    """

    path: Path
    nbytes: int
    expert_bytes: int
    recipe: Recipe
    tokens: int
    agreement: float
    dense: Stage
    split: Stage
    distilled: Stage | None


@checked
def refactor(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    experts: int = 16,
    used: int = 1,
    shared: int | None = None,
    width: int | None = None,
    type: str | None = None,
    text: Sequence[str] | None = None,
    minutes: float = 10.0,
    seed: int = 0,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Refactored:
    """Makes a mixture with one router for all layers out of a dense GGUF file.

    base: a dense model of architecture llama. experts: domains that tokens are told apart into.
    used: experts that a token takes. shared: channels of a feed-forward that every token uses;
    None takes half of them. width: channels of an expert; None takes a quarter. If shared +
    experts * width is the base's width, each channel has one place. Both must be multiples of
    the type's block. type: type of the feed-forwards; None keeps the base's. text: calibration
    texts, the last tenth of each held out to measure; None lets the base write one. minutes: for
    all but the perplexities, about; 0 splits without fitting. threads: the engine's; None takes
    all cores.

    The file appears under its name only when it is complete; an interruption leaves nothing. An
    existing `out` is replaced only with `force`. progress: called with (what is done, how much of
    it, of how much).
    Raises OptionError, ModelFileError, UnsupportedModelError; DeviceError if the disk is full.
    """
    from ..runtime._core import GgufFile

    began = time.monotonic()
    path, base_path = Path(out), Path(base)
    file = GgufFile(str(base_path))
    if (found := file.get("general.architecture")) != "llama":
        raise UnsupportedModelError(
            f"{file.path}: general.architecture: expected llama, found {found}"
        )
    dense = DenseBase(file, None, "F32")  # the type of less than whole matrices is checked below
    layers = LlamaLayers(dense)
    decided = recipe(
        dense,
        experts=experts,
        used=used,
        shared=shared,
        width=width,
        type=type,
        minutes=minutes,
        seed=seed,
    )
    check_output(path, [base_path], force=force)
    if text is not None and not any(t.strip() for t in text):
        raise OptionError("text: expected some text, found none")
    work = _Refactoring(layers, decided, threads or os.cpu_count() or 1, progress)
    return work.run(path, text, began)


class _Refactoring:
    """One run of `refactor`."""

    def __init__(
        self,
        layers: LlamaLayers,
        recipe: Recipe,
        threads: int,
        progress: Progress | None,
    ) -> None:
        self._layers, self._dense, self._recipe = layers, layers.dense, recipe
        self._threads, self._progress = threads, progress
        self._file = RefactoredFile(layers.dense, recipe, threads)
        self._splits: dict[int, Split] = {}
        self._tokens_of_layers: list[int] = []  # tokens that each layer was fitted to

    def run(self, path: Path, text: Sequence[str] | None, began: float) -> Refactored:
        """Does all steps, from text to file."""
        r, d = self._recipe, self._dense
        model = self._model(Path(d.file.path))
        fitting, measured = self._tokens(model, text)
        dense = self._stage(model, measured)
        del model
        window = fitting.shape[1]
        started = self._after_first_layer(fitting[: max(1, _DOMAIN_TOKENS // window)])
        rows = started.reshape(-1, d.n_embd)
        labels = self._domains(rows)
        self._report("router", 0, 1)
        self._router = train(
            rows, labels, r.experts, hidden=self._file.hidden, eps=self._layers.eps, seed=r.seed
        )
        self._report("router", 1, 1)
        agreed = agreement(self._router, rows, labels)
        self._measure_channels(started[: max(1, _SPLIT_TOKENS // window)])
        trial = path.with_name(f".{path.name}.split")
        try:
            self._file.write(trial, self._router, self._splits, self._unfitted())
            split = self._stage(self._model(trial), measured)
            if r.minutes == 0:
                os.replace(trial, path)
        finally:
            with suppress(FileNotFoundError):
                trial.unlink()
        distilled = None
        if r.minutes > 0:
            deadline = began + 60 * r.minutes
            fitting = fitting[: self._affordable(started, deadline - time.monotonic())]
            fitted = self._fitted(self._after_first_layer(fitting), deadline)
            self._file.write(path, self._router, self._splits, fitted)
            distilled = self._stage(self._model(path), measured)
        made, seen = self._file, self._tokens_of_layers
        tokens = round(sum(seen) / max(1, len(seen)))
        return Refactored(
            path, made.layout.size, made.expert_bytes, r, tokens, agreed, dense, split, distilled
        )

    # Tokens, and the model's states on them.

    def _model(self, path: Path) -> Model:
        from ..runtime.model import Model
        from ..runtime.options import LoadOptions

        trained = int(self._dense.file.get("llama.context_length") or _WINDOW)
        return Model(path, LoadOptions(threads=self._threads, context=min(_WINDOW, trained)))

    def _tokens(self, model: Model, text: Sequence[str] | None) -> tuple[Indices, list[int]]:
        """Tokens to fit on, [sequences, window], and those to measure on."""
        window = model.engine.sequence().context
        if text is None:
            written = own_text(model, _OWN_TOKENS, self._recipe.seed, self._progress)
            texts = [[t for sequence in written for t in sequence]]
        else:
            texts = [
                list(model.tokenizer.encode(t, add_special=False, parse_special=False))
                for t in text
                if t.strip()
            ]
        measured: list[int] = []
        sources: list[npt.NDArray[np.int64]] = []
        for ids in texts:
            held = min(_HELD_OUT // len(texts), len(ids) // 10) // window
            held = max(1, held) * window
            measured += ids[len(ids) - held :]
            fitting = np.array(ids[: (len(ids) - held) // window * window])
            sources.append(fitting.reshape(-1, window))
        least = max(1, -(-2 * self._recipe.experts // window))
        if sum(map(len, sources)) < least or len(measured) < window:
            raise OptionError(
                f"text: expected at least {(least + 1) * window} tokens in each text, found "
                f"{min(map(len, texts))}"
            )
        # Every text gives the same share, wherever a time limit cuts.
        places = [(i + 0.5) / len(s) for s in sources for i in range(len(s))]
        mixed = np.concatenate(sources)[np.argsort(places, kind="stable")].astype(np.int64)
        rng = np.random.default_rng([self._recipe.seed, 6])
        most = min(_MOST_TOKENS, _STATE_BYTES // (12 * self._dense.n_embd)) // window
        mixed = mixed[rng.permutation(len(mixed))[: max(1, most)]]
        tokenizer = model.tokenizer
        if tokenizer.add_bos and tokenizer.bos_id is not None:  # as in the measurement
            mixed[:, 0] = tokenizer.bos_id
        return mixed, measured

    def _stage(self, model: Model, tokens: list[int]) -> Stage:
        window = model.engine.sequence().context
        total = len(tokens) // window

        def report(done: int, _total: int, _ppl: float) -> None:
            self._report("perplexity", done, total)

        found = model.perplexity(tokens, context=window, progress=report)
        return Stage(found.ppl, int(model.engine.plan["token_bytes"]))

    def _after_first_layer(self, tokens: Indices) -> Floats:
        x = self._layers.embeddings(tokens)
        layer = self._layers.layer(0)
        layer.attend(x)
        rows = x.reshape(-1, x.shape[-1])
        for begin in range(0, len(rows), _BATCH):
            part = rows[begin : begin + _BATCH]
            part += layer.channels(layer.normed(part)) @ layer.down
        return x

    def _domains(self, rows: Floats) -> Indices:
        """The cluster of each residual stream after layer 0, [tokens]."""
        flat = np.ones(rows.shape[1], dtype=np.float32)
        states = rms_norm(rows, flat, self._layers.eps)
        states -= states.mean(axis=0)
        states = unit(states)
        sample = states[: 1 << 14]
        centres = spherical_kmeans(sample, self._recipe.experts, self._recipe.seed)
        labels: Indices = (states @ centres.T).argmax(axis=1)
        return labels

    def _routes(self, rows: Floats) -> Routes:
        chosen = np.sort(self._router.routes(rows, self._recipe.used), axis=1)
        sets, which = np.unique(chosen, axis=0, return_inverse=True)
        which = which.reshape(-1)
        return {
            tuple(int(e) for e in experts): np.flatnonzero(which == i)
            for i, experts in enumerate(sets)
        }

    def _measure_channels(self, started: Floats) -> None:
        """Chooses every layer's split from the dense model's activations."""
        r, d = self._recipe, self._dense
        x = started.copy()
        rows = x.reshape(-1, d.n_embd)
        best = self._router.routes(rows, 1)[:, 0]
        for index in range(1, d.n_layer):
            layer = self._layers.layer(index)
            layer.attend(x)
            energy = np.zeros((r.experts, d.n_ff))
            uses = np.zeros((r.experts, 1))
            for begin in range(0, len(rows), _BATCH):
                part = rows[begin : begin + _BATCH]
                h = layer.channels(layer.normed(part))
                member = (best[begin : begin + _BATCH, None] == np.arange(r.experts)).astype(
                    np.float32
                )
                energy += member.T @ (h * h)
                uses += member.sum(axis=0)[:, None]
                part += h @ layer.down
            weight = np.einsum("ij,ij->i", layer.down, layer.down, dtype=np.float64)
            # A domain that this sample lacks is taken to be like the mean of all.
            mean = (energy + energy.sum(axis=0) / max(1.0, float(uses.sum()))) / (uses + 1)
            self._splits[index] = choose(mean * weight, r.shared, r.width)
            self._report("channels", index, d.n_layer - 1)

    # Down projections by layer: [columns of the split, n_embd], and the columns' energies.

    def _unfitted(self) -> Iterator[tuple[int, Floats, Floats | None]]:
        for index, split in self._splits.items():
            down = self._dense.values(f"blk.{index}.ffn_down.weight").T
            yield index, down[split.all], None

    def _fitted(
        self, started: Floats, deadline: float
    ) -> Iterator[tuple[int, Floats, Floats | None]]:
        """Fits every layer to the dense model, on what the refactored layers before it give.

        deadline: by time.monotonic(); if layers take longer than planned, those that are left see
        fewer tokens.
        """
        d = self._dense
        routes = self._routes(started.reshape(-1, d.n_embd))
        mine, theirs = started, started.copy()
        for index, split in self._splits.items():
            began = time.monotonic()
            layer = self._layers.layer(index)
            layer.attend(mine)
            layer.attend(theirs)
            x, y = (s.reshape(-1, d.n_embd) for s in (mine, theirs))
            fit, active = self._equations(layer, split, routes, x, y)
            down = fit.solve(layer.down[split.all], _PRIOR_TOKENS)
            energy = (fit.energy / np.maximum(fit.uses, 1)).astype(np.float32)
            yield index, down, energy
            # Later layers make up for the rounding, too.
            down = self._file.rounded(index, down, energy)
            for (experts, tokens), h in zip(_batches(routes), active, strict=True):
                x[tokens] += h @ down[split.of(experts)]
            self._report("fitting", index, d.n_layer - 1)
            self._tokens_of_layers.append(len(x))
            took, left = time.monotonic() - began, d.n_layer - 1 - index
            allowed = (deadline - time.monotonic()) / max(1, left)
            if allowed < took and left:
                n = max(_least_sequences(mine), int(len(mine) * allowed / took))
                mine, theirs = mine[:n], theirs[:n]
                routes = {e: t[t < n * mine.shape[1]] for e, t in routes.items()}

    def _equations(
        self, layer: LlamaLayer, split: Split, routes: Routes, x: Floats, y: Floats
    ) -> tuple[ChannelFit, list[Floats]]:
        """The layer's normal equations and active channels; y gets the dense layer's output."""
        fit = ChannelFit(split, x.shape[1])
        active: list[Floats] = []
        for experts, tokens in _batches(routes):
            dense = y[tokens]
            dense += layer.channels(layer.normed(dense)) @ layer.down
            y[tokens] = dense
            before = x[tokens]
            h = layer.channels(layer.normed(before), split.all[split.of(experts)])
            fit.add(experts, h, dense - before)
            active.append(h)
        return fit, active

    def _affordable(self, started: Floats, seconds: float) -> int:
        """How many sequences can be fitted in about this time, found by fitting one layer."""
        index = min(self._splits)
        sample = started[: _least_sequences(started)].copy()
        layer, split = self._layers.layer(index), self._splits[index]
        other = sample.copy()
        began = time.monotonic()
        layer.attend(sample)
        layer.attend(other)
        x, y = (s.reshape(-1, self._dense.n_embd) for s in (sample, other))
        fit, _ = self._equations(layer, split, self._routes(x), x, y)
        middle = time.monotonic()
        fit.solve(layer.down[split.all], _PRIOR_TOKENS)
        solving = time.monotonic() - middle
        each = (middle - began) / len(sample)
        return max(len(sample), int((seconds / len(self._splits) - 2 * solving) / (1.2 * each)))

    def _report(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)


def _least_sequences(states: Floats) -> int:
    """Sequences that a fit never goes below, of states [sequences, window, n_embd]."""
    return max(1, _LEAST_TOKENS // int(states.shape[1]))


def _batches(routes: Routes) -> Iterator[tuple[tuple[int, ...], Indices]]:
    """All tokens, a few thousand of one route at a time, always in the same order."""
    for experts, tokens in routes.items():
        for begin in range(0, len(tokens), _BATCH):
            yield experts, tokens[begin : begin + _BATCH]

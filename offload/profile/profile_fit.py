"""Fits the predictor `linear` to a recording; the data that `stoker profile` fits predictors to."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...runtime.base.progress import Progress
from .adam import Adam

Floats = npt.NDArray[np.float32]

# Ridge strengths, which pull towards the start; a hidden state has a mean square of 1 a value.
_RIDGES = (30.0, 100.0, 300.0, 1000.0)
_VALIDATION = 8  # one part in so many of the tokens chooses between the strengths
# The parameters of distilling.
_EPOCHS = 8
_BATCH = 256
_RATE = 2e-3
_SPREAD = 2.0  # standard deviation of the initial scores
_ROW = 32  # rows of a map are padded to a multiple of this (offload/predict/map.h)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that predictors depend on."""

    n_layer: int
    n_embd: int
    n_expert: int
    n_expert_used: int

    def header(self, predictor: str) -> bytes:
        """Returns the beginning of a predictor's state (offload/predict/state.h)."""
        sizes = (self.n_layer, self.n_embd, self.n_expert, self.n_expert_used)
        return struct.pack("<4sI16s4q", b"SKPS", 1, predictor.encode(), *sizes)


@dataclass(frozen=True)
class Recording:
    """The hidden states, router logits and experts of a model's layers on some tokens.

    hidden: float16 [n_layer + 1, tokens, n_embd], each scaled to unit RMS: the embeddings, then
        the state that is known while a layer's experts are being read.
    logits: float32 [n_layer, tokens, n_expert], the routers' logits.
    experts: int32 [tokens, n_layer, n_expert_used], best first; -1 in layers without experts.
    routers: float32 [n_layer, n_expert, n_embd], such that routers @ hidden orders a layer's own
        experts as its logits do if its router reads hidden. first: bool [tokens], true where
        sequences begin.
    """

    shape: Shape
    hidden: npt.NDArray[np.float16]
    logits: Floats
    experts: npt.NDArray[np.int32]
    routers: Floats
    first: npt.NDArray[np.bool_]

    @property
    def n_tokens(self) -> int:
        """The number of recorded tokens."""
        return int(self.experts.shape[0])

    def part(self, begin: int, end: int) -> Recording:
        """Returns the tokens from `begin` to before `end`."""
        return Recording(
            self.shape,
            self.hidden[:, begin:end],
            self.logits[:, begin:end],
            self.experts[begin:end],
            self.routers,
            self.first[begin:end],
        )

    def has_experts(self, layer: int) -> bool:
        """Returns whether a layer is a mixture of experts."""
        return bool(self.experts[0, layer, 0] >= 0)


def recall(scores: Floats, experts: npt.NDArray[np.int32], width: int) -> float:
    """Returns the share of experts [tokens, used] in the `width` best scores [tokens, n_expert]."""
    width = min(width, scores.shape[1])
    guessed = np.zeros(scores.shape, dtype=bool)
    best = np.argpartition(-scores, width - 1, axis=1)[:, :width]
    np.put_along_axis(guessed, best, True, axis=1)
    return float(np.take_along_axis(guessed, experts.astype(np.int64), axis=1).mean())


def map_bytes(weights: Floats) -> bytes:
    """Returns the Q8_0 rows of a map [rows, cols], padded to whole blocks."""
    from ...runtime._core import quantize

    rows, cols = weights.shape
    padded = np.zeros((rows, -(-cols // _ROW) * _ROW), dtype=np.float32)
    padded[:, :cols] = weights
    return quantize("Q8_0", padded).tobytes()


def fit_linear(
    recording: Recording,
    distances: int,
    progress: Progress | None = None,
    *,
    seconds: float = 0.0,
) -> bytes:
    """Returns the state of `linear`: maps from each layer to the next `distances` routers.

    The maps come from ridge regression towards the next router on the present hidden state, or
    towards zero; the target and strength are those that do best on the last eighth of the tokens.
    In at most `seconds` (0: not at all) the maps then learn which experts are used by logistic
    regression, and keep what does better.
    """
    shape = recording.shape
    n = recording.n_tokens
    held = n - max(n // _VALIDATION, 1)
    out = [shape.header("linear"), struct.pack("<q", distances)]
    end = time.monotonic() + seconds
    for source in range(shape.n_layer):
        x = recording.hidden[source].astype(np.float32)
        rms = np.sqrt(np.mean(np.square(x), axis=0)) + np.float32(1e-3)
        out.append((1 / rms).astype("<f4").tobytes())
        targets = [
            layer
            for layer in range(source, min(source + distances, shape.n_layer))
            if recording.has_experts(layer)
        ]
        maps = _fit_source(recording, source, targets, x, held)
        if seconds > 0 and maps:
            now = time.monotonic()
            stop = now + (end - now) / (shape.n_layer - source)
            _distil(recording, maps, x / rms, rms=rms, held=held, end=stop)
        for layer in range(source, source + distances):
            out.append(struct.pack("<q", layer in maps))
            if layer in maps:
                weights, bias = maps[layer]
                out += [bias.astype("<f4").tobytes(), map_bytes(weights * rms)]
        if progress is not None:
            progress("linear maps", source + 1, shape.n_layer)
    return b"".join(out)


def _fit_source(
    recording: Recording, source: int, targets: Sequence[int], x: Floats, held: int
) -> dict[int, tuple[Floats, Floats]]:
    """Fits maps ([n_expert, n_embd] weights, [n_expert] bias) from one source to each target."""
    shape = recording.shape
    found: dict[int, tuple[Floats, Floats]] = {}
    if not targets:
        return found
    # The embedding differs much from what routers read, so only later sources start from routers.
    starts = (0.0, 1.0) if source > 0 else (0.0,)
    gram = x[:held].T @ x[:held]
    mean = x[:held].mean(axis=0)
    gram -= held * np.outer(mean, mean)
    y = np.concatenate([recording.logits[layer] for layer in targets], axis=1)
    routers = np.concatenate([recording.routers[layer] for layer in targets])
    best = [(-1.0, 0.0, 0.0)] * len(targets)  # best (recall, start, ridge) of each target
    fits = {}
    base = x @ routers.T
    for start in starts:
        rest = y - np.float32(start) * base
        rest_mean = rest[:held].mean(axis=0)
        moment = x[:held].T @ rest[:held] - held * np.outer(mean, rest_mean)
        for ridge in _RIDGES:
            solved = _solve(gram, moment, ridge)
            weights = solved + np.float32(start) * routers.T
            bias = rest_mean - mean @ solved
            fits[start, ridge] = (weights, bias)
            scores = x[held:] @ weights + bias
            for i, layer in enumerate(targets):
                part = scores[:, i * shape.n_expert : (i + 1) * shape.n_expert]
                value = recall(part, recording.experts[held:, layer], shape.n_expert_used)
                best[i] = max(best[i], (value, start, ridge))
    for i, layer in enumerate(targets):
        columns = slice(i * shape.n_expert, (i + 1) * shape.n_expert)
        weights, bias = fits[best[i][1:]]
        found[layer] = (weights[:, columns].T, bias[columns])
    return found


def _distil(
    recording: Recording,
    maps: dict[int, tuple[Floats, Floats]],
    x: Floats,
    *,
    rms: Floats,
    held: int,
    end: float,
) -> None:
    """Replaces maps by distilled ones that find more of the held-out experts, until `end`.

    x: the maps' inputs, each column divided by its rms. end: a time of time.monotonic().
    """
    experts, n_expert = recording.experts, recording.shape.n_expert
    targets = list(maps)
    starts, biases = [], []
    for weights, bias in maps.values():
        scores = x[:held] @ (weights * rms).T + bias
        factor = np.float32(_SPREAD / max(float(scores.std()), 1e-6))
        starts.append((weights * rms).T * factor)
        biases.append((bias - scores.mean()) * factor - np.float32(_SPREAD))
    parameters = [np.concatenate(starts, axis=1), np.concatenate(biases)]
    best = {
        layer: recall(x[held:] @ (weights * rms).T + bias, experts[held:, layer], experts.shape[2])
        for layer, (weights, bias) in maps.items()
    }
    adam = Adam(parameters, _RATE)
    rng = np.random.default_rng(len(targets))
    began, step = time.monotonic(), 0
    batches = max(1, held // _BATCH)
    for _ in range(_EPOCHS):
        for rows in np.array_split(rng.permutation(held), batches):
            now = time.monotonic()
            if now >= end:
                return
            scores = x[rows] @ parameters[0] + parameters[1]
            error = 1 / (1 + np.exp(-np.clip(scores, -30, 30)))
            for i, layer in enumerate(targets):
                used = experts[rows, layer].astype(np.int64) + i * n_expert
                error[np.arange(len(rows))[:, None], used] -= 1
            error /= np.float32(len(rows))
            part = max(step / (_EPOCHS * batches), (now - began) / (end - began))
            adam.step((x[rows].T @ error, error.sum(axis=0)), part)
            step += 1
        scores = x[held:] @ parameters[0] + parameters[1]
        for i, layer in enumerate(targets):
            columns = slice(i * n_expert, (i + 1) * n_expert)
            found = recall(scores[:, columns], experts[held:, layer], experts.shape[2])
            if found > best[layer]:
                best[layer] = found
                maps[layer] = (parameters[0][:, columns].T / rms, parameters[1][columns].copy())


def _solve(gram: Floats, moment: Floats, ridge: float) -> Floats:
    matrix = gram.astype(np.float64)
    matrix[np.diag_indices(len(matrix))] += ridge
    return np.linalg.solve(matrix, moment.astype(np.float64)).astype(np.float32)

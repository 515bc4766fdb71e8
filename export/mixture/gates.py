"""Gates of a pre-gated mixture: linear maps that predict the next mixture layer's router.

A gate reads what a layer's own router reads, and is distilled from the next mixture layer's router
on recorded states: ridge regression towards its logits, then Adam on the cross-entropy with its
probabilities. The stage that does best on a held-out part of the text is taken.
Source: Hwang et al., Pre-gated MoE, 2024, for the idea; there the whole model is fine-tuned
with its gates, here only the gates learn, which a CPU does in minutes.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...offload.profile.adam import Adam
from ...runtime.base.errors import DeviceError, ModelFileError
from ...runtime.base.progress import Progress

if TYPE_CHECKING:
    from ...runtime.model import Model

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]

_RIDGES = (10.0, 100.0, 1000.0)  # strengths of the ridge penalty, for inputs of unit RMS
_VALIDATION = 8  # one token in so many is held out to choose between the stages
_EPOCHS = 10
_BATCH = 256
_RATE = 2e-3
_TEMPERATURE = np.float32(2)  # of both softmaxes in training: the less likely experts count more
_MOST_HALF = 65504.0
_PIECE = 4096  # tokens multiplied at once


@dataclass(frozen=True)
class Gate:
    """logits of the next mixture layer's experts = weight [n_expert, n_embd] @ input + bias."""

    weight: Floats
    bias: Floats

    def logits(self, x: npt.NDArray[np.floating]) -> Floats:
        """Logits [tokens, n_expert] of inputs [tokens, n_embd]."""
        return np.asarray(np.asarray(x, dtype=np.float32) @ self.weight.T + self.bias)


@dataclass(frozen=True)
class Agreement:
    """How well a gate's choices replace its layer's router's.

    layer: the one whose experts are chosen. found: share of the router's experts that the gate
    chooses. weight: share of their probability that the gate's choices have. kl: of the gate's
    probabilities to the router's, nats a token.
    """

    layer: int
    found: float
    weight: float
    kl: float


@dataclass(frozen=True)
class Routing:
    """What a mixture's routers do: their matrices by layer [n_expert, n_embd], experts used."""

    routers: Mapping[int, Floats]
    used: int
    sigmoid: bool

    @property
    def pairs(self) -> Sequence[tuple[int, int]]:
        """(the layer that has a gate, the layer whose experts it chooses)."""
        layers = sorted(self.routers)
        return list(pairwise(layers))

    def logits(self, layer: int, x: npt.NDArray[np.floating]) -> Floats:
        """Logits of a layer's own router, from its inputs [tokens, n_embd].

        Experts are chosen by their softmax, which sums to 1.
        """
        router = self.routers[layer].T
        parts = [
            np.asarray(x[i : i + _PIECE], dtype=np.float32) @ router
            for i in range(0, len(x), _PIECE)
        ]
        logits = np.concatenate(parts)
        return -np.logaddexp(np.float32(0), -logits) if self.sigmoid else logits


def record(
    model: Model,
    sequences: Sequence[Sequence[int]],
    folder: str | os.PathLike[str],
    progress: Progress | None = None,
) -> Halves:
    """Records what every layer's router reads, [n_layer, tokens, n_embd], in a file in `folder`.

    Raises DeviceError if the disk is full, ModelFileError for states that are not finite.
    """
    n = sum(map(len, sequences))
    shape = (int(model.config["n_layer"]), n, int(model.config["n_embd"]))
    path = os.path.join(folder, "states")
    _allocate(path, math.prod(shape) * np.dtype(np.float16).itemsize)
    states: Halves = np.memmap(path, np.float16, "r+", shape=shape)
    sequence = model.engine.sequence()
    done = 0
    for tokens in sequences:
        sequence.truncate(0)
        taps = sequence.eval_taps(tokens)
        if not np.isfinite(taps).all():
            raise ModelFileError(f"{model.path}: the model computes values that are not finite")
        states[:, done : done + len(tokens)] = np.clip(taps, -_MOST_HALF, _MOST_HALF)
        done += len(tokens)
        if progress is not None:
            progress("hidden states", done, n)
    return states


def _allocate(path: str, nbytes: int) -> None:
    """Makes a file with all its space: writing a mapped file on a full disk kills the process."""
    with open(path, "wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DeviceError(
                    f"no space left in {os.path.dirname(path)}: {nbytes / 1e6:.0f} MB needed for "
                    "the hidden states; fewer tokens need less"
                ) from error
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        file.truncate(nbytes)


def fit_gates(
    states: Halves,
    routing: Routing,
    *,
    seconds: float,
    seed: int,
    progress: Progress | None = None,
) -> dict[int, Gate]:
    """Fits the gates; the result is by the layer that has them.

    states: from `record`. seconds: for all the training; if they are enough, the seed decides
    everything.
    """
    gates: dict[int, Gate] = {}
    pairs = routing.pairs
    end = time.monotonic() + seconds
    for done, (layer, target) in enumerate(pairs):
        now = time.monotonic()
        fit = _Fit(
            np.asarray(states[layer], dtype=np.float32),
            routing.logits(target, states[target]),
            routing,
        )
        gates[layer] = fit.gate(
            np.random.default_rng([seed, layer]),
            now + (end - now) / (len(pairs) - done),
        )
        if progress is not None:
            progress("gates", done + 1, len(pairs))
    return gates


def agreement(states: Halves, routing: Routing, gates: Mapping[int, Gate]) -> list[Agreement]:
    """Compares every gate with the router that it predicts, on states from `record`."""
    found = []
    for layer, target in routing.pairs:
        p = _softmax(routing.logits(target, states[target]))
        z = gates[layer].logits(states[layer])
        q = _softmax(z)
        kl = np.sum(p * (np.log(p + 1e-20) - np.log(q + 1e-20)), axis=1)
        found.append(
            Agreement(
                target, _found(z, p, routing.used), _weight(z, p, routing.used), float(kl.mean())
            )
        )
    return found


class _Fit:
    """One gate in training: inputs at unit RMS a column, router's logits and probabilities."""

    def __init__(self, x: Floats, y: Floats, routing: Routing) -> None:
        self._factor = 1 / (np.sqrt(np.mean(np.square(x), axis=0)) + np.float32(1e-6))
        self._x = x * self._factor
        self._y, self._used = y, routing.used
        self._p, self._soft = _softmax(y), _softmax(y / _TEMPERATURE)
        every = np.arange(len(x)) // 16 % _VALIDATION == 0  # runs of 16 tokens, not single ones
        self._learnt, self._kept = np.flatnonzero(~every), np.flatnonzero(every)

    def gate(self, rng: np.random.Generator, end: float) -> Gate:
        """The best gate found until `end` (time.monotonic)."""
        best = max(self._ridges(), key=self._score)
        trained = self._trained(*best, rng, end)
        weight, bias = max((best, *trained), key=self._score)
        return Gate(np.ascontiguousarray((weight * self._factor[:, None]).T), bias)

    def _score(self, candidate: tuple[Floats, Floats]) -> float:
        weight, bias = candidate
        z = self._x[self._kept] @ weight + bias
        return _weight(z, self._p[self._kept], self._used)

    def _ridges(self) -> Sequence[tuple[Floats, Floats]]:
        x, y = self._x[self._learnt], self._y[self._learnt]
        mean, y_mean = x.mean(axis=0), y.mean(axis=0)
        gram = (x.T @ x - len(x) * np.outer(mean, mean)).astype(np.float64)
        moment = (x.T @ y - len(x) * np.outer(mean, y_mean)).astype(np.float64)
        found = []
        for ridge in _RIDGES:
            weight = np.linalg.solve(gram + ridge * np.eye(len(gram)), moment).astype(np.float32)
            found.append((weight, y_mean - mean @ weight))
        return found

    def _trained(
        self, weight: Floats, bias: Floats, rng: np.random.Generator, end: float
    ) -> Sequence[tuple[Floats, Floats]]:
        """Weight and bias after each epoch. The rate falls to 0 by the last one, or by `end`."""
        began = time.monotonic()
        parameters = [weight / _TEMPERATURE, bias / _TEMPERATURE]
        adam = Adam(parameters, _RATE)
        batches = max(1, len(self._learnt) // _BATCH)
        steps = _EPOCHS * batches
        step = 0
        found: list[tuple[Floats, Floats]] = []
        for _ in range(_EPOCHS):
            for rows in np.array_split(rng.permutation(self._learnt), batches):
                now = time.monotonic()
                if now >= end:
                    return found
                part = max(step / steps, (now - began) / (end - began))
                step += 1
                x = self._x[rows]
                z = x @ parameters[0] + parameters[1]
                error = (_softmax(z) - self._soft[rows]) / np.float32(len(rows))
                adam.step((x.T @ error, error.sum(axis=0)), part)
            found.append((parameters[0] * _TEMPERATURE, parameters[1] * _TEMPERATURE))
        return found


def _softmax(logits: Floats) -> Floats:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True), dtype=np.float32)


def _best(scores: Floats, used: int) -> npt.NDArray[np.intp]:
    return np.argpartition(-scores, used - 1, axis=1)[:, :used]


def _found(z: Floats, p: Floats, used: int) -> float:
    """Share of the `used` largest of p [tokens, experts] among those of z."""
    right = np.zeros(p.shape, dtype=bool)
    np.put_along_axis(right, _best(p, used), True, axis=1)
    return float(np.take_along_axis(right, _best(z, used), axis=1).mean())


def _weight(z: Floats, p: Floats, used: int) -> float:
    """Share of the probability of the `used` largest of p that the `used` largest of z have."""
    chosen = np.take_along_axis(p, _best(z, used), axis=1).sum(axis=1)
    most = np.take_along_axis(p, _best(p, used), axis=1).sum(axis=1)
    return float((chosen / most).mean())

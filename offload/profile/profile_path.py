"""Trains the network of the predictor `path` (offload/predict/path.cc), with numpy alone."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from ...runtime.base.progress import Progress
from .profile_fit import Floats, Recording, Shape, map_bytes

_HIDDEN = 256
_EPOCHS = 12
_BATCH = 64
_RATE = 2e-3
_WARM_UP = 50  # steps in which the learning rate rises to its maximum
_DECAY = 1e-3  # weight decay per step, times the rate's share of its maximum
_DROPPED_VALUES = 0.1  # share of embedding values dropped in training
_DROPPED_PASTS = 0.15  # share of tokens without a predecessor, as the first of each chunk will be


def fit_path(recording: Recording, *, seed: int = 0, progress: Progress | None = None) -> bytes:
    """Trains the predictor `path` and returns its state.

    The network has a hidden layer of 256 over the embedding and the previous token's experts. It is
    trained by softmax over each layer's experts, with equal targets for the used ones, and by Adam
    with warm-up and cosine decay. The seed determines the result.
    """
    shape = recording.shape
    embedding = recording.hidden[0].astype(np.float32)
    factor = 1 / (np.sqrt(np.mean(np.square(embedding), axis=0)) + np.float32(1e-3))
    x = embedding * factor
    layers = np.flatnonzero(recording.experts[0, :, 0] >= 0)
    units = recording.experts[:, layers] + (layers * shape.n_expert)[None, :, None]
    units = units.reshape(recording.n_tokens, -1)
    network = _Network(shape, np.random.default_rng(seed))
    network.train(x, units, recording.first, progress)
    w1, wp, b1, w2, b2 = network.weights
    return b"".join(
        [
            shape.header("path"),
            struct.pack("<q", _HIDDEN),
            factor.astype("<f4").tobytes(),
            b1.astype("<f4").tobytes(),
            map_bytes(w1.T),
            map_bytes(wp),
            b2.astype("<f4").tobytes(),
            map_bytes(w2.T),
        ]
    )


class _Network:
    """The weights [n_embd, H], [units, H], [H], [H, units], [units], and their training."""

    def __init__(self, shape: Shape, rng: np.random.Generator) -> None:
        def normal(rows: int, cols: int, scale: float) -> Floats:
            return (rng.standard_normal((rows, cols)) * scale).astype(np.float32)

        self.shape, self.rng = shape, rng
        n_units = shape.n_layer * shape.n_expert
        self.weights = [
            normal(shape.n_embd, _HIDDEN, shape.n_embd**-0.5),
            normal(n_units, _HIDDEN, 0.05),
            np.zeros(_HIDDEN, dtype=np.float32),
            normal(_HIDDEN, n_units, 0.3 * _HIDDEN**-0.5),
            np.zeros(n_units, dtype=np.float32),
        ]
        self._mean = [np.zeros_like(w) for w in self.weights]
        self._square = [np.zeros_like(w) for w in self.weights]

    def train(
        self,
        x: Floats,
        units: npt.NDArray[np.int32],
        first: npt.NDArray[np.bool_],
        progress: Progress | None,
    ) -> None:
        """Trains on x [n, n_embd]; units [n, k] used by each token; first [n]: no predecessor."""
        n, n_units = len(x), len(self.weights[4])
        batch = min(_BATCH, n)
        steps, step = _EPOCHS * (n // batch), 0
        for epoch in range(_EPOCHS):
            order = self.rng.permutation(n)
            for at in range(0, n - batch + 1, batch):
                rows = order[at : at + batch]
                target = np.zeros((batch, n_units), dtype=np.float32)
                np.put_along_axis(target, units[rows], 1, axis=1)
                past = np.zeros((batch, n_units), dtype=np.float32)
                np.put_along_axis(past, units[rows - 1], 1, axis=1)
                past[first[rows] | (self.rng.random(batch) < _DROPPED_PASTS)] = 0
                kept = x[rows] * (self.rng.random((batch, x.shape[1])) >= _DROPPED_VALUES)
                slopes = self._slopes(kept, past, target)
                step += 1
                self._descend(slopes, step, step / steps)
            if progress is not None:
                progress("path network", epoch + 1, _EPOCHS)

    def _slopes(self, x: Floats, past: Floats, target: Floats) -> list[Floats]:
        """Returns the gradients of a batch's mean cross-entropy by each of the weights."""
        w1, wp, b1, w2, b2 = self.weights
        sums = x @ w1 + past @ wp + b1
        hidden = np.maximum(sums, 0)
        scores = (hidden @ w2 + b2).reshape(len(x), -1, self.shape.n_expert)
        scores -= scores.max(axis=2, keepdims=True)
        share = np.exp(scores)
        share /= share.sum(axis=2, keepdims=True)
        wanted = target.reshape(scores.shape)
        # A layer without experts has no targets and contributes no gradient.
        share *= wanted.any(axis=2, keepdims=True)
        error = (share - wanted / np.float32(self.shape.n_expert_used)) / np.float32(len(x))
        error = error.reshape(len(x), -1)
        back = (error @ w2.T) * (sums > 0)
        return [x.T @ back, past.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0)]

    def _descend(self, slopes: list[Floats], step: int, done: float) -> None:
        """Takes a step of Adam (Kingma and Ba, 2015) with decoupled decay; done: share of steps."""
        part = min(1.0, step / _WARM_UP) * (0.5 + 0.5 * np.cos(np.pi * done))
        for i, slope in enumerate(slopes):
            self._mean[i] += np.float32(0.1) * (slope - self._mean[i])
            self._square[i] += np.float32(0.001) * (np.square(slope) - self._square[i])
            scale = np.sqrt(self._square[i] / np.float32(1 - 0.999**step)) + np.float32(1e-8)
            self.weights[i] -= np.float32(_RATE * part / (1 - 0.9**step)) * self._mean[i] / scale
            if slope.ndim > 1:
                self.weights[i] *= np.float32(1 - _DECAY * part)

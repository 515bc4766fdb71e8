"""Measures of how far one next-token distribution is from another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Returns ln p of every token, [n, n_vocab]."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def token_nll(logits: Floats, window: Sequence[int]) -> npt.NDArray[np.float64]:
    """Returns -ln p of each window token but the first, [n - 1], nats; logits [n, n_vocab]."""
    p = log_softmax(logits[:-1])
    return np.asarray(-p[np.arange(len(window) - 1), list(window[1:])])


def divergence(a: Floats, b: Floats) -> npt.NDArray[np.float64]:
    """Returns KL(a || b) of the logits' distributions, [n], nats; both [n, n_vocab]."""
    p, q = log_softmax(a), log_softmax(b)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1)).clip(min=0.0)

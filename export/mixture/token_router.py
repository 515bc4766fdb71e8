"""The one router of a refactored model: from the residual stream after layer 0 to experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .llama_layers import Floats, Indices, rms_norm

_BATCH = 256  # tokens of a training step
_RATE = 3e-3
_STEPS = 1000
_MOMENTS = (np.float32(0.9), np.float32(0.99))  # decay of Adam's means


@dataclass(frozen=True)
class TokenRouter:
    """logits = down relu(up (rms_norm(x) * norm)).

    norm [d], up [hidden, d], down [experts, hidden].
    """

    norm: Floats
    up: Floats
    down: Floats
    eps: float

    def logits(self, x: Floats) -> Floats:
        """Logits [n, experts] of residual streams x [n, d]."""
        hidden = rms_norm(x, self.norm, self.eps) @ self.up.T
        logits: Floats = np.maximum(hidden, 0) @ self.down.T
        return logits

    def routes(self, x: Floats, used: int) -> Indices:
        """The experts of each row of x [n, d]: [n, used], best first; ties to the lower one."""
        order: Indices = np.argsort(-self.logits(x), axis=1, kind="stable")[:, :used]
        return order


def train(
    x: Floats, labels: Indices, experts: int, *, hidden: int, eps: float, seed: int
) -> TokenRouter:
    """Trains a router to predict the domains labels [n] from residual streams x [n, d].

    Cross-entropy by Adam (Kingma and Ba, 2014), with a rate that falls to 0; the same seed gives
    the same router.
    """
    rng = np.random.default_rng([seed, 5])
    n, d = x.shape
    rows = rms_norm(x, np.ones(d, dtype=np.float32), eps)
    # Inputs of equal size learn equally fast; the weight of the model's norm does this scaling.
    norm = (1 / (np.sqrt((rows * rows).mean(axis=0)) + np.float32(1e-3))).astype(np.float32)
    rows *= norm
    weights = [
        (rng.standard_normal((hidden, d)) * np.sqrt(2 / d)).astype(np.float32),
        (rng.standard_normal((experts, hidden)) * np.sqrt(1 / hidden)).astype(np.float32),
    ]
    first = [np.zeros_like(w) for w in weights]
    second = [np.zeros_like(w) for w in weights]
    for step in range(_STEPS if experts > 1 else 0):
        batch = rng.integers(n, size=min(_BATCH, n))
        z, up, down = rows[batch], *weights
        h = np.maximum(z @ up.T, 0)
        p = h @ down.T
        p = np.exp(p - p.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        p[np.arange(len(batch)), labels[batch]] -= 1
        p /= np.float32(len(batch))
        back = (p @ down) * (h > 0)
        rate = np.float32(_RATE * (1 - step / _STEPS))
        for i, gradient in enumerate((back.T @ z, p.T @ h)):
            first[i] += (1 - _MOMENTS[0]) * (gradient - first[i])
            second[i] += (1 - _MOMENTS[1]) * (gradient * gradient - second[i])
            m = first[i] / (1 - _MOMENTS[0] ** np.float32(step + 1))
            v = second[i] / (1 - _MOMENTS[1] ** np.float32(step + 1))
            weights[i] -= rate * m / (np.sqrt(v) + np.float32(1e-8))
    return TokenRouter(norm, weights[0], weights[1], eps)


def agreement(router: TokenRouter, x: Floats, labels: npt.NDArray[np.int64]) -> float:
    """The share of rows x [n, d] that the router gives to their own domain first."""
    return float((router.routes(x, 1)[:, 0] == labels).mean())

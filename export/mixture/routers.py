"""Initial routers of an upcycled mixture: directions in the space of hidden states, sharpened."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .kmeans import Matrix, spherical_kmeans, unit

# The share of softmax's weight that the used experts carry, on average over tokens. The rest is
# lost if a family does not renormalise.
_USED_SHARE = 0.995
_SHARPENING_TOKENS = 1024


def kmeans_router(states: Matrix, experts: int, used: int, seed: int) -> Matrix:
    """Router [experts, d] whose rows are the centroids of the states [n, d], n >= experts."""
    return _sharpened(spherical_kmeans(unit(states), experts, seed), states, used)


def random_router(states: Matrix, experts: int, used: int, seed: int) -> Matrix:
    """Router [experts, d] that uses all experts alike: random directions in whitened states.

    Unwhitened, the direction that all states share would always choose the same few.
    """
    mean = states.mean(axis=0)
    centred = states - mean
    covariance = centred.T @ centred / np.float32(len(states))
    d = len(mean)
    # The floor keeps directions that the sample has not seen from dominating.
    floor = np.float32(0.05 * np.trace(covariance) / d + 1e-12)
    lower = np.linalg.cholesky(covariance + floor * np.eye(d, dtype=np.float32))
    directions = np.random.default_rng(seed).standard_normal((experts, d)).astype(np.float32)
    rows = np.linalg.solve(lower.T, directions.T).T
    rows = rows - np.outer(rows @ mean, mean) / max(float(mean @ mean), 1e-12)
    return _sharpened(rows.astype(np.float32), states, used)


def _sharpened(rows: Matrix, states: Matrix, used: int) -> Matrix:
    """Rows [experts, d] times the smallest factor that gives the used experts their share."""
    logits = (states[:: -(-len(states) // _SHARPENING_TOKENS)] @ rows.T).astype(np.float32)
    # The used experts' logits stand last, whatever the factor.
    logits = np.partition(logits, -used, axis=1)
    logits -= logits.max(axis=1, keepdims=True)
    spread = float(logits.std()) or 1.0
    low, high = 0.1 / spread, 1e4 / spread
    for _ in range(20):
        middle = (low * high) ** 0.5
        weights: npt.NDArray[np.float32] = np.exp(logits * np.float32(middle))
        share = weights[:, -used:].sum(axis=1) / weights.sum(axis=1)
        if float(share.mean()) < _USED_SHARE:
            low = middle
        else:
            high = middle
    return np.ascontiguousarray(rows * np.float32(high), dtype=np.float32)

"""Spherical k-means: unit centroids that stand for clusters of directions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]


def spherical_kmeans(x: Matrix, k: int, seed: int, *, iterations: int = 20) -> Matrix:
    """Unit centroids [k, d] of the unit rows x [n, d], n >= k, by cosine similarity.

    Starts from k-means++ seeds; a cluster that runs empty restarts at the row that is farthest
    from its centroid. Source: Dhillon and Modha, Concept decompositions for large sparse text
    data using clustering, 2001.
    """
    rng = np.random.default_rng(seed)
    centroids = _seeds(x, k, rng)
    labels = np.full(len(x), -1)
    for _ in range(iterations):
        similarity = x @ centroids.T
        nearest = similarity.argmax(axis=1)
        if np.array_equal(nearest, labels):
            break
        labels = nearest
        rows = np.arange(len(x))
        member = np.zeros((len(x), k), dtype=np.float32)
        member[rows, labels] = 1
        sums = member.T @ x
        empty = np.flatnonzero(np.bincount(labels, minlength=k) == 0)
        if len(empty):
            worst = np.argsort(similarity[rows, labels], kind="stable")
            sums[empty] = x[worst[: len(empty)]]
        centroids = unit(sums)
    return centroids


def _seeds(x: Matrix, k: int, rng: np.random.Generator) -> Matrix:
    """k rows of x, each drawn with probability proportional to its distance from those before."""
    chosen = [int(rng.integers(len(x)))]
    distance = np.full(len(x), np.inf)
    for _ in range(1, k):
        distance = np.minimum(distance, np.maximum(1.0 - x @ x[chosen[-1]], 0.0))
        total = distance.sum(dtype=np.float64)
        if total > 0:
            chosen.append(int(rng.choice(len(x), p=distance / total)))
        else:  # there are fewer distinct rows than clusters
            chosen.append(int(rng.integers(len(x))))
    seeds: Matrix = x[chosen]
    return seeds


def unit(x: Matrix) -> Matrix:
    """Rows of x [n, d] at length 1; rows of zeros stay."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    scaled: Matrix = (x / np.where(length > 0, length, 1)).astype(np.float32)
    return scaled

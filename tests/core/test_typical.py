"""Locally typical sampling against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from stoker.runtime._core import Sampler
from stoker.runtime.base.errors import OptionError

N = 30


def typical(p: np.ndarray, mass: float) -> set[int]:
    """The tokens nearest to the entropy whose probabilities first exceed `mass`."""
    entropy = -(p * np.log(p)).sum()
    order = np.argsort(np.abs(-np.log(p) - entropy), kind="stable")
    n = int(np.searchsorted(np.cumsum(p[order]), mass, side="right")) + 1
    return set(order[:n].tolist())


@pytest.mark.parametrize("mass", [0.05, 0.3, 0.7, 0.95])
def test_what_can_be_drawn(mass: float) -> None:
    rng = np.random.default_rng(4)
    logits = np.sort(rng.normal(0, 2, N).astype(np.float32))[::-1].copy()
    x = logits.astype(np.float64)
    p = np.exp(x - x.max())
    p /= p.sum()
    sampler = Sampler(N, temperature=1.0, typical_p=mass, seed=1)
    drawn = {sampler.sample(logits) for _ in range(20_000)}
    expected = typical(p, mass)
    assert drawn <= expected
    # Rare ones may be missing.
    assert {t for t in expected if p[t] / sum(p[list(expected)]) > 2e-3} <= drawn


def test_the_likeliest_token_can_be_left_out() -> None:
    """One sure token among many unlikely ones is less typical than its rivals."""
    p = np.array([0.35] + [0.65 / (N - 1)] * (N - 1))
    assert 0 not in typical(p, 0.3)
    sampler = Sampler(N, temperature=1.0, typical_p=0.3, seed=1)
    assert 0 not in {sampler.sample(np.log(p).astype(np.float32)) for _ in range(500)}


def test_out_of_range() -> None:
    with pytest.raises(OptionError, match="typical_p: expected a number of 0 to 1"):
        Sampler(N, typical_p=1.5)
